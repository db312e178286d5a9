"""Which stages a spec asks for, in order, each with its key: the same list is planned, run and reported.

Nothing runs here. Requests hold references to artifacts that need not exist yet: keys follow from requests alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evaluation.profile.config import ProfileConfig
from flows.spec.branches import DENSE, Derivation
from flows.spec.run import CalibrationSpec, EvalSpec, RunSpec
from flows.spec.steps import PruneStep, RecoverStep
from infra.artifacts.store import ArtifactRef
from infra.errors import SourceMissing
from infra.keys import slug, stage_key
from infra.sources.find import Sources
from tasks.devices.placement import device_label
from tasks.requests import (
    CalibrateRequest,
    CaptureRequest,
    EvaluateRequest,
    ImportRequest,
    OrderRequest,
    ProfileRequest,
    PruneRequest,
    RecoverRequest,
    Request,
)
from tasks.stages.calibrate import calibrate
from tasks.stages.capture import capture
from tasks.stages.evaluate import MISSING, evaluate
from tasks.stages.import_model import import_model
from tasks.stages.order import order
from tasks.stages.profile import profile
from tasks.stages.prune import prune
from tasks.stages.recover import recover

if TYPE_CHECKING:
    from prefect import Task

    from evaluation.suite import DataNeed
    from tasks.execution.context import StageResult


@dataclass(frozen=True)
class Stage:
    """One stage of one run. checkpoint: name in the run of the checkpoint that it makes or measures, if any."""

    name: str
    task: Task[..., StageResult]
    request: Request
    checkpoint: str | None = None

    @property
    def ref(self) -> ArtifactRef:
        """The artifact it makes."""
        return self.request.ref


@dataclass(frozen=True)
class StageGraph:
    """All cached stages of a run in an order in which each comes after its inputs.

    checkpoints: by name; two names that ask for the same stand for one artifact. reports: what is measured, under every
    name, also where that is one stage.
    """

    spec: RunSpec
    stages: tuple[Stage, ...]
    checkpoints: dict[str, ArtifactRef]
    reports: tuple[Stage, ...]

    @property
    def twins(self) -> dict[str, str]:
        """Names of checkpoints that are the same as an earlier one, with that one's name."""
        first: dict[str, str] = {}
        for name, ref in self.checkpoints.items():
            first.setdefault(ref.key, name)
        return {name: first[ref.key] for name, ref in self.checkpoints.items() if first[ref.key] != name}

    @property
    def run_key(self) -> str:
        """Identity of the run: its name and the keys of its stages. The same spec on the same data is the same run."""
        name = self.spec.name
        return stage_key(f"run-{slug(name)}", 1, {"name": name, "stages": [stage.ref.key for stage in self.stages]})


def build_stages(spec: RunSpec, sources: Sources, device_setting: str) -> StageGraph:
    """The story of a run. Raises SourceMissing if a model, or a data set that the spec names, cannot be found."""
    dense = _import(spec, sources)
    stages, checkpoints = [dense], {DENSE: dense.ref}
    for made in spec.derivations:
        before = checkpoints[made.source]
        if isinstance(made.step, PruneStep):
            added = _prune(made.step, made, before, _calibration_for(made, spec, dense.ref, sources))
        else:
            added = [_recover(made.step, made.name, before, sources)]
        stages += added
        checkpoints[made.name] = added[-1].ref
    reports = []
    for entry in spec.evals:
        reports += [_evaluate(entry, name, checkpoints, sources) for name in spec.measured_by(entry)]
    if spec.profile:
        label = device_label(device_setting)
        for name in spec.measured(spec.profile.on):
            reports.append(_profile(spec.profile.settings, name, checkpoints, label))
    return StageGraph(spec, _once(stages + reports), checkpoints, tuple(reports))


def _once(stages: list[Stage]) -> tuple[Stage, ...]:
    """Each key once: what several branches ask for has the name of the first."""
    first = {stage.ref.key: stage for stage in reversed(stages)}
    return tuple(stage for stage in stages if first[stage.ref.key] is stage)


def _import(spec: RunSpec, sources: Sources) -> Stage:
    model = spec.model
    located = sources.find(model.id, "model", revision=model.revision)
    request = ImportRequest(
        source=located.identity,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        model_id=model.id,
        revision=model.revision,
    )
    return Stage("import-model", import_model, request, DENSE)


def _calibrate(asked: CalibrationSpec | None, checkpoint: ArtifactRef, sources: Sources) -> Stage:
    assert asked is not None, "RunSpec refuses to prune without calibration"
    located = sources.find(asked.data.dataset, "dataset", revision=asked.data.revision)
    request = CalibrateRequest(
        checkpoint=checkpoint,
        source=located.identity,
        config=asked.data.config,
        split=asked.data.split,
        text_field=asked.data.text_field,
        data_files=asked.data.data_files,
        num_samples=asked.num_samples,
        seq_len=asked.seq_len,
        num_heldout=asked.num_heldout,
        seed=asked.seed,
        join=asked.join,
        template=asked.data.template,
        rows=asked.data.rows,
        data=asked.data,
    )
    return Stage("calibrate", calibrate, request)


def _calibration_for(made: Derivation, spec: RunSpec, checkpoint: ArtifactRef, sources: Sources) -> Stage:
    asked = spec.calibration_of(made)
    stage = _calibrate(asked, checkpoint, sources)
    return stage if asked == spec.calibration else replace(stage, name=f"{stage.name}:{made.variant}")


def _prune(step: PruneStep, made: Derivation, checkpoint: ArtifactRef, calibration: Stage) -> list[Stage]:
    """Calibration, a capture and an order if the method wants them, and the pruning itself."""
    needed: list[Stage] = [calibration]
    statistics = orders = None
    if step.module.needs_statistics(step.config):
        request = CaptureRequest(checkpoint=checkpoint, calibration=calibration.ref)
        # a capture serves every sparsity, so it is named after what it looks at: "capture:dense"
        name = calibration.name.replace("calibrate", f"capture:{made.source}", 1)
        needed.append(Stage(name, capture, request))
        statistics = request.ref
        if (asked := step.module.order_config(step.config)) is not None:
            ordering = OrderRequest(
                plugin=step.method, config=_plain(asked), checkpoint=checkpoint, statistics=statistics
            )
            if name == f"capture:{made.source}" and made.changes.options.keys() & asked.model_dump().keys():
                name = f"{name}:{made.variant}"
            needed.append(Stage(name.replace("capture", "order", 1), order, ordering))
            orders = ordering.ref
    pruning = PruneRequest(
        plugin=step.method,
        config=_plain(step.config),
        checkpoint=checkpoint,
        calibration=calibration.ref,
        statistics=statistics,
        orders=orders,
    )
    return [*needed, Stage(f"prune:{made.name}", prune, pruning, made.name)]


def _recover(step: RecoverStep, name: str, checkpoint: ArtifactRef, sources: Sources) -> Stage:
    data = step.config.data
    located = sources.find(data.dataset, "dataset", revision=data.revision)
    request = RecoverRequest(
        plugin=step.recovery, config=_plain(step.config), checkpoint=checkpoint, source=located.identity
    )
    return Stage(f"recover:{name}", recover, request, name)


def _evaluate(entry: EvalSpec, name: str, checkpoints: dict[str, ArtifactRef], sources: Sources) -> Stage:
    entry.module.check(entry.config)
    options = _plain(entry.config)
    named = {value for value in options.values() if isinstance(value, str)}
    needs = entry.module.needs(entry.config)
    request = EvaluateRequest(
        plugin=entry.suite,
        config=options,
        checkpoint=checkpoints[name],
        reference=checkpoints[DENSE] if entry.compares else None,
        sources=tuple(_identity(need, sources, named=need.repo_id in named) for need in needs),
    )
    return Stage(f"evaluate:{entry.label}:{name}", evaluate, request, name)


def _identity(need: DataNeed, sources: Sources, *, named: bool) -> dict[str, str]:
    """What the key says of a data set. One that the spec does not name itself (a task of lm-eval reads it) and that is
    not there fails its own stage, and no other. Raises SourceMissing for one that the spec names."""
    try:
        return sources.find(need.repo_id, "dataset", revision=need.revision).identity
    except SourceMissing:
        if named:
            raise
        return {MISSING: need.repo_id}


def _profile(settings: ProfileConfig, name: str, checkpoints: dict[str, ArtifactRef], device: str) -> Stage:
    request = ProfileRequest(
        checkpoint=checkpoints[name],
        reference=checkpoints[DENSE] if name != DENSE else None,
        settings=_plain(settings),
        device_name=device,
    )
    return Stage(f"profile:{name}", profile, request, name)


def _plain(config: Any) -> dict[str, Any]:
    return dict(config.model_dump(mode="json"))
