"""What can be known to fail before any work: checked in seconds, so that nothing fails after hours."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from evaluation.errors import EvaluationError
from evaluation.profile.config import FileProfileConfig, ProfileConfig
from evaluation.profile.report import NO_RUNTIME
from evaluation.suite import ModelFacts, TextNeed
from flows.errors import SpecError
from flows.run.graph import Stage, StageGraph
from flows.run.leaks import check_leaks
from flows.run.locate import Identities
from flows.run.recoveries import check_recovery, check_trained_pruning, check_vocabulary
from flows.spec.run import RunSpec
from infra.artifacts.store import ArtifactRef
from infra.errors import ResultsUnusable, SettingsInvalid, SourceMissing, SourceUnreadable
from infra.filesystem.disk import why_unwritable
from infra.models.import_model import ModelCard, describe
from infra.remote.store import remote_store
from infra.results.rows import DENSE
from infra.settings import Settings
from infra.sources.find import Sources, TextData
from infra.tracking.database import check_store
from pruning.errors import PruningError
from pruning.families import FAMILIES, LayerCost, family_named
from pruning.plan import LayerShape
from tasks.devices.leases import check_lease
from tasks.devices.placement import BALANCED, device_names
from tasks.execution.context import RunContext
from tasks.execution.disk_forecast import Forecast, Need, check_room
from tasks.execution.stage import importing
from tasks.requests import (
    CalibrateRequest,
    EvaluateRequest,
    ExportRequest,
    FileProfileRequest,
    ProfileRequest,
    PruneRequest,
    RecoverRequest,
    Request,
)
from tasks.stages.evaluate import MISSING, check_local_data

log = logging.getLogger("slimline")

DataProblem = SourceMissing | SourceUnreadable | EvaluationError


def check(graph: StageGraph, run_context: RunContext) -> None:
    """Raise the error of the first thing that cannot work: an unwritable store, a missing device, an unsupported
    model, windows longer than the model's context, texts without the columns, too little disk; in a night, training
    on what is measured, of which a run warns."""
    store, settings = run_context.store, run_context.settings
    store.preflight()
    check_store(settings.tracking_uri)
    if reason := why_unwritable(settings.results_root):
        raise ResultsUnusable(
            f"results cannot be written in {settings.results_root} ({reason}); make it writable, or set "
            "SLIMLINE_RESULTS_DB or SLIMLINE_RESULTS_FOLDER to another place"
        )
    sharing = remote_store(settings)
    missing = [stage for stage in graph.stages if not store.has(stage.ref)]
    if not missing:
        return
    sharing.check()
    check_lease(settings)
    model = graph.spec.model
    card = describe(run_context.sources.find(model.id, "model", revision=model.revision))
    _check_family(card, graph.spec)
    _check_context(card, graph.spec)
    _check_device(settings)
    _check_evaluations(missing, card, _DataCheck(graph.identities, run_context.sources))
    _check_profile(missing, card, settings)
    for request in (stage.request for stage in missing):
        if isinstance(request, CalibrateRequest):
            _check_columns(request.data, request.data.columns, run_context.sources)
        elif isinstance(request, RecoverRequest):
            check_recovery(request, card, model, run_context)
        elif isinstance(request, PruneRequest) and request.trains:
            check_trained_pruning(request, card, run_context.sources)
        elif isinstance(request, PruneRequest) and request.rebuilds_vocabulary:
            check_vocabulary(request, card, model, run_context.sources)
        elif isinstance(request, ExportRequest):
            _check_export(card)
    _check_prunings(missing, graph.checkpoints[DENSE], card)
    _check_disk([stage.request for stage in missing], run_context)
    check_leaks(graph, missing, run_context)


def _check_prunings(stages: Sequence[Stage], dense: ArtifactRef, card: ModelCard) -> None:
    """What a method cannot take from a model of these widths costs its own branch only, with a warning; only if no
    branch is left is it raised. Where the headers do not tell the widths, and for checkpoints that are still to be
    pruned, the stage itself asks."""
    prunings = [(stage.name, stage.request) for stage in stages if isinstance(stage.request, PruneRequest)]
    problems: dict[str, PruningError] = {}
    for name, request in prunings:
        if request.checkpoint == dense:
            try:
                _check_pruning(request, card)
            except PruningError as problem:
                problems[name] = problem
    if problems and len(problems) == sum(request.checkpoint == dense for _, request in prunings):
        raise next(iter(problems.values()))
    for name, reason in problems.items():
        log.warning("%s will fail, the other branches are run: %s", name, reason)


def _check_pruning(request: PruneRequest, card: ModelCard) -> None:
    layer = decoder_layer(card)
    if layer is not None:
        shape, cost, _ = layer
        family = family_named(card.model_type)
        request.module.check_model(request.typed_config, (shape,) * card.num_layers, cost, family)


def decoder_layer(card: ModelCard) -> tuple[LayerShape, LayerCost, int] | None:
    """Widths and cost of a layer, and the size of a head; None where the headers do not tell the widths."""
    if card.num_heads is None or card.num_kv_heads is None or card.intermediate_size is None:
        return None
    family = family_named(card.model_type)
    if family.experts is not None and not card.num_experts:
        return None
    shape = LayerShape(
        num_heads=card.num_heads, num_kv_heads=card.num_kv_heads, intermediate_size=card.intermediate_size,
        num_experts=card.num_experts if family.experts else 0,
    )  # fmt: skip
    head_dim = (card.attention_size or card.hidden_size) // card.num_heads
    cost = LayerCost(
        per_query_head=2 * head_dim * card.hidden_size,
        per_kv_head=2 * head_dim * card.hidden_size,
        per_channel=(2 + (family.gate_name is not None)) * card.hidden_size,
        fixed=2 * card.hidden_size,
        stock_heads=family.stock_heads(card.hidden_size, head_dim),
        per_expert=card.hidden_size if family.experts else 0,
    )
    return shape, cost, head_dim


def _check_disk(requests: Sequence[Request], run_context: RunContext) -> None:
    """All that the run will keep, and the largest scratch folder on top of it, must have room."""
    forecast = Forecast(run_context.store, run_context.sources, run_context.settings)
    needs = [forecast.need(request) for request in requests]
    need = Need(sum(need.artifact for need in needs), max(need.scratch for need in needs))
    what = f"the run ({len(needs)} stages that are still to be made)"
    check_room(what, need, run_context.store, run_context.settings, requests=requests)


def _check_family(card: ModelCard, spec: RunSpec) -> None:
    known = sorted({model_type for family in FAMILIES for model_type in family.model_types})
    if card.model_type not in known:
        raise PruningError(
            f"model {spec.model.id} has the unsupported architecture {card.model_type!r}; supported: {', '.join(known)}"
        )


def _check_export(card: ModelCard) -> None:
    family = next(family for family in FAMILIES if card.model_type in family.model_types)
    if family.llama_cpp is None:
        known = ", ".join(each.name for each in FAMILIES if each.llama_cpp)
        raise PruningError(
            f"exports: GGUF files of the family {family.name} are not written, of {known} they are; leave exports out"
        )


def _check_context(card: ModelCard, spec: RunSpec) -> None:
    longest = card.max_position_embeddings
    changed = {each.variant: spec.calibration_of(each) for each in spec.derivations if each.changes.calibration}
    for variant, calibration in ({"": spec.calibration} | changed).items():
        if longest is not None and calibration is not None and calibration.seq_len > longest:
            of_variant = f" of variant {variant}" if variant else ""
            raise SpecError(
                f"calibration.seq_len {calibration.seq_len}{of_variant} is longer than the context of {spec.model.id}; "
                f"lower it to at most {longest}"
            )


def _check_evaluations(stages: Sequence[Stage], card: ModelCard, data: _DataCheck) -> None:
    """What cannot be measured on this model is refused, and so are texts without the split or column that the spec
    names. Data that is not there or is damaged costs its own stages only, with a warning; only if that were all of them
    is it raised, since there would be nothing to run for."""
    facts = ModelFacts(card.max_position_embeddings, card.has_chat_template)
    measured = [(stage.name, stage.request) for stage in stages if isinstance(stage.request, EvaluateRequest)]
    problems: dict[str, DataProblem] = {}
    failing = []
    for name, request in measured:
        request.module.check_model(request.typed_config, facts)
        if problem := data.problem(request):
            failing.append(name)
            problems[str(problem)] = problem
    if failing and len(failing) == len(measured):
        raise next(iter(problems.values()))
    for message in problems:
        log.warning("%s", message)
    if failing:
        log.warning("these evaluations will fail for want of data, the others are run: %s", ", ".join(failing))


def _check_profile(stages: Sequence[Stage], card: ModelCard, settings: Settings) -> None:
    for request in (stage.request for stage in stages if isinstance(stage.request, ProfileRequest)):
        config = ProfileConfig.model_validate(request.settings)
        config.check_lengths(card.max_position_embeddings)
        if config.compile:
            from evaluation.profile.compilation import check_compiler  # imports torch

            check_compiler(device_names(settings.device)[0])
    files = [stage.request for stage in stages if isinstance(stage.request, FileProfileRequest)]
    for file in files:
        FileProfileConfig.model_validate(file.settings).check_lengths(card.max_position_embeddings)
    if any(not file.runtime for file in files):
        log.warning("exported files are measured without tokens/s: %s", NO_RUNTIME)


class _DataCheck:
    """Whether the data of evaluations can be read; the same data is read once, though every checkpoint asks for it."""

    def __init__(self, identities: Identities, sources: Sources) -> None:
        self._identities = identities
        self._sources = sources
        self._checked: dict[str, DataProblem | None] = {}

    def problem(self, request: EvaluateRequest) -> DataProblem | None:
        """None if there is none. Raises SourceInvalid for a split or column that the texts do not have."""
        for identity in request.sources:
            if MISSING in identity:
                return self._identities.missing[identity[MISSING]]
        need = getattr(request.typed_config, "texts", None)
        data = TextData(**need.model_dump()) if isinstance(need, TextNeed) else None
        key = data.model_dump_json() if data else request.model_dump_json(include={"plugin", "config"})
        if key not in self._checked:
            self._checked[key] = self._read(request, data)
        return self._checked[key]

    def _read(self, request: EvaluateRequest, data: TextData | None) -> DataProblem | None:
        try:
            if data is not None:
                _check_columns(data, (data.text_field,), self._sources)
            else:
                with importing:
                    check_local_data(request, self._sources)
        except (SourceUnreadable, EvaluationError) as error:
            return error
        return None


def _check_columns(data: TextData, columns: Sequence[str], sources: Sources) -> None:
    with importing:  # `datasets` fails while a stage of another cell of the night imports transformers
        sources.check_columns(data, columns)


def _check_device(settings: Settings) -> None:
    num_processes = {"WALK": settings.walk_processes, "EVAL": settings.eval_processes}
    if settings.device in ("auto", "cpu") and max(num_processes.values()) == 1:
        return  # any device will do, and torch takes seconds to import
    names = device_names(settings.device)
    for word, processes in num_processes.items():
        if names[0].startswith("cuda") and processes > len(names):
            raise SettingsInvalid(
                f"SLIMLINE_{word}_PROCESSES={processes}: each process needs a CUDA device of its own and there are "
                f"{len(names)}; set it to at most that"
            )
    if settings.device == BALANCED and settings.eval_processes > 1:
        raise SettingsInvalid(
            f"SLIMLINE_EVAL_PROCESSES={settings.eval_processes} puts a copy of the model on each device, and "
            "SLIMLINE_DEVICE=balanced spreads one over all of them; leave one of the two out"
        )
