"""Which stages a spec asks for, in order, each with its key: the same list is planned, run and reported.

Nothing runs here. Requests hold references to artifacts that need not exist yet: keys follow from requests alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evaluation.profile.llama_cpp import installed_runtime
from flows.run.graph import Stage, StageGraph
from flows.run.locate import Identities, locate
from flows.spec.branches import Derivation
from flows.spec.measures import EvalSpec, ExportedFile
from flows.spec.run import RunSpec
from flows.spec.steps import PruneStep
from infra.artifacts.store import ArtifactRef
from infra.results.rows import DENSE
from pruning.training.data import data_read
from tasks.devices.placement import device_label
from tasks.exporting.in_run import export, profile_file
from tasks.requests import (
    CalibrateRequest,
    CaptureRequest,
    EvaluateRequest,
    ExportRequest,
    FileProfileRequest,
    ImportRequest,
    OrderRequest,
    ProfileRequest,
    PruneRequest,
    RecoverRequest,
)
from tasks.stages.calibrate import calibrate
from tasks.stages.capture import capture
from tasks.stages.evaluate import evaluate
from tasks.stages.import_model import import_model
from tasks.stages.order import order
from tasks.stages.profile import profile
from tasks.stages.prune import prune
from tasks.stages.recover import recover

if TYPE_CHECKING:
    from tasks.execution.context import RunContext


def plan_stages(spec: RunSpec, run_context: RunContext) -> StageGraph:
    """The stages of a spec on this machine. Raises what `locate` raises."""
    # torch, which knows the device, takes seconds to import
    device = device_label(run_context.settings.device) if spec.profile else ""
    return build_stages(spec, locate(spec, run_context.sources), device, installed_runtime())


def build_stages(spec: RunSpec, identities: Identities, device: str, runtime: str = "") -> StageGraph:
    """The stages of a spec; asks neither disk nor network. device, runtime: what is profiled, with which llama.cpp if
    any, parts of profiles' keys."""
    dense = _import(spec, identities)
    stages, checkpoints = [dense], {DENSE: dense.ref}
    for derivation in spec.derivations:
        source = checkpoints[derivation.source]
        if isinstance(derivation.step, PruneStep) and derivation.step.reads_data:
            added = [_prune_by_data(derivation, source, identities)]
        elif isinstance(derivation.step, PruneStep):
            added = _prune(derivation, source, _calibrate(derivation, spec, checkpoints, identities))
        else:
            added = _recover(derivation, spec, checkpoints, identities)
        stages += added
        checkpoints[derivation.name] = added[-1].ref
    reports = [
        _evaluate(entry, name, checkpoints, identities) for entry in spec.evals for name in spec.measured_by(entry)
    ]
    if spec.profile:
        settings = _plain(spec.profile.settings)
        reports += [_profile(settings, name, checkpoints, device) for name in spec.measured(spec.profile.on)]
    files = [_export(file, checkpoints) for file in spec.files]
    for file, written in zip(spec.files, files, strict=True):
        reports += _measure_file(file, written.ref, checkpoints, identities, runtime)
    # each key once: what several branches ask for has the name of the first
    everything = stages + files + reports
    first = {stage.ref.key: stage for stage in reversed(everything)}
    unique = tuple(stage for stage in everything if first[stage.ref.key] is stage)
    return StageGraph(spec, identities, unique, checkpoints, tuple(reports))


def _import(spec: RunSpec, identities: Identities) -> Stage:
    model = spec.model
    request = ImportRequest(
        source=identities.model,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        model_id=model.id,
        revision=model.revision,
    )
    return Stage(import_model, request)


def _calibrate(
    derivation: Derivation, spec: RunSpec, checkpoints: Mapping[str, ArtifactRef], identities: Identities
) -> Stage:
    """The calibration set that a step uses, named after whose tokens it is made of if that is not the dense model, and
    after its variant if that has one of its own."""
    config, origin = spec.calibration_of(derivation), spec.tokenizer_of(derivation.source)
    assert config is not None, "RunSpec refuses to prune without calibration"
    data = config.data
    request = CalibrateRequest(
        checkpoint=checkpoints[origin],
        source=identities.datasets[data.dataset, data.revision],
        config=data.config,
        split=data.split,
        text_field=data.text_field,
        data_files=data.data_files,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        num_heldout=config.num_heldout,
        seed=config.seed,
        join=config.join,
        template=data.template,
        rows=data.rows,
        data=data,
    )
    variant = "" if config == spec.calibration else derivation.variant
    return Stage(calibrate, request, checkpoint="" if origin == DENSE else origin, variant=variant)


def _prune(derivation: Derivation, source: ArtifactRef, calibration: Stage) -> list[Stage]:
    """Calibration, a capture and an order if the method wants them, and the pruning itself."""
    step = derivation.step
    assert isinstance(step, PruneStep)
    needed: list[Stage] = [calibration]
    statistics = orders = None
    if step.module.needs_statistics(step.config):
        capturing = CaptureRequest(checkpoint=source, calibration=calibration.ref)
        # it serves every sparsity, so it is named after the checkpoint that it reads
        needed.append(Stage(capture, capturing, checkpoint=derivation.source, variant=calibration.variant))
        statistics = capturing.ref
    if (order_config := step.module.order_config(step.config)) is not None:
        options = _plain(order_config)
        reads = statistics if step.module.ORDERS_FROM == "statistics" else calibration.ref
        ordering = OrderRequest(
            plugin=step.method, config=options, checkpoint=source, **{step.module.ORDERS_FROM: reads}
        )
        changed = derivation.changes.options.keys() & options.keys()
        variant = calibration.variant or (derivation.variant if changed else "")
        needed.append(Stage(order, ordering, checkpoint=derivation.source, variant=variant))
        orders = ordering.ref
    request = PruneRequest(
        plugin=step.method,
        config=_plain(step.config),
        checkpoint=source,
        calibration=calibration.ref,
        statistics=statistics,
        orders=orders,
    )
    return [*needed, Stage(prune, request, checkpoint=derivation.name)]


def _prune_by_data(derivation: Derivation, source: ArtifactRef, identities: Identities) -> Stage:
    """A method that reads data sets of its own needs neither calibration windows nor an order."""
    module, config = derivation.step.module, derivation.step.config
    request = PruneRequest(
        plugin=derivation.step.plugin,
        config=_plain(config),
        checkpoint=source,
        sources=_sources(module, config, identities),
    )
    return Stage(prune, request, checkpoint=derivation.name)


def _sources(module: Any, config: Any, identities: Identities) -> tuple[dict[str, str], ...]:
    """Of the data sets that a plug-in reads."""
    return tuple(identities.datasets[data.dataset, data.revision] for data in data_read(module, config))


def _recover(
    derivation: Derivation, spec: RunSpec, checkpoints: Mapping[str, ArtifactRef], identities: Identities
) -> list[Stage]:
    """The training, with the calibration windows and the import of a teacher that it needs: by default the dense model,
    with the tokenizer of what is trained."""
    module, config = derivation.step.module, derivation.step.config
    needed: list[Stage] = []
    teacher = calibration = None
    if "teacher" in module.NEEDS:
        teacher = checkpoints[spec.tokenizer_of(derivation.source)]
        if (other := getattr(config, "teacher", None)) is not None:
            importing = ImportRequest(source=identities.teachers[other], dtype=spec.model.dtype, model_id=other)
            needed.append(Stage(import_model, importing, checkpoint="teacher"))
            teacher = importing.ref
    if "calibration" in module.NEEDS:
        needed.append(_calibrate(derivation, spec, checkpoints, identities))
        calibration = needed[-1].ref
    request = RecoverRequest(
        plugin=derivation.step.plugin,
        config=_plain(config),
        checkpoint=checkpoints[derivation.source],
        teacher=teacher,
        calibration=calibration,
        sources=_sources(module, config, identities),
    )
    return [*needed, Stage(recover, request, checkpoint=derivation.name)]


def _evaluate(
    entry: EvalSpec,
    name: str,
    checkpoints: dict[str, ArtifactRef],
    identities: Identities,
    *,
    export: ArtifactRef | None = None,
    called: str = "",
) -> Stage:
    """export: a file of the checkpoint that is measured in its place, `called` so."""
    request = EvaluateRequest(
        plugin=entry.suite,
        config=_plain(entry.config),
        checkpoint=checkpoints[name],
        reference=checkpoints[DENSE] if entry.compares else None,
        export=export,
        sources=identities.evaluations[entry.label],
    )
    return Stage(evaluate, request, label=entry.label, checkpoint=called or name)


def _profile(settings: dict[str, Any], name: str, checkpoints: dict[str, ArtifactRef], device: str) -> Stage:
    request = ProfileRequest(
        checkpoint=checkpoints[name],
        reference=checkpoints[DENSE] if name != DENSE else None,
        settings=settings,
        device_name=device,
    )
    return Stage(profile, request, checkpoint=name)


def _export(file: ExportedFile, checkpoints: dict[str, ArtifactRef]) -> Stage:
    request = ExportRequest(checkpoint=checkpoints[file.checkpoint], format=file.entry.format, type=file.type)
    return Stage(export, request, label=f"{file.entry.format}-{file.type}", checkpoint=file.checkpoint)


def _measure_file(
    file: ExportedFile,
    export: ArtifactRef,
    checkpoints: dict[str, ArtifactRef],
    identities: Identities,
    runtime: str,
) -> list[Stage]:
    """The evaluations of its weights, its size and its speed, if any is asked for."""
    if file.entry.measure is None:
        return []
    timing = _plain(file.entry.measure.timing)
    request = FileProfileRequest(export=export, settings=timing, runtime=runtime)
    measured = [
        _evaluate(entry, file.checkpoint, checkpoints, identities, export=export, called=file.name)
        for entry in file.evals
    ]
    return [*measured, Stage(profile_file, request, checkpoint=file.name)]


def _plain(config: Any) -> dict[str, Any]:
    return dict(config.model_dump(mode="json"))
