"""Stage: a checkpoint made smaller by a pruning method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.execution.context import StageContext
from tasks.execution.interrupts import something_to_save
from tasks.execution.stage import Devices, stage
from tasks.requests import PruneRequest
from tasks.stages.recover import read_data

if TYPE_CHECKING:
    from pruning.walk.options import WalkOptions
    from tasks.execution.curves import Curves
    from tasks.execution.progress import Progress

_TOKENIZERS = "transformers.models.auto.tokenization_auto"


@dataclass(frozen=True)
class _Job:
    """What each process of a pruning does; the leader writes."""

    request: PruneRequest
    source: Path
    calibration: Path
    statistics: Path | None
    orders: Path | None
    out: Path
    work: Path

    def __call__(self, options: WalkOptions, progress: Progress, curves: Curves) -> None:
        from pruning.calibration import CalibrationSet
        from pruning.layerwise.streaming import prune_checkpoint
        from tasks.recording.layers import shown_in

        pruned = prune_checkpoint(
            self.source,
            self.out,
            self.request.module,
            CalibrationSet.load(self.calibration),
            self.request.typed_config,
            statistics=self.statistics,
            orders=self.orders,
            options=options,
            work=self.work,
            progress=progress,
            on_entry=shown_in(curves),
        )
        if options.process_group.leads:
            report = pruned.model_dump_json(indent=1, exclude={"plan"})
            (self.out / "pruning.json").write_text(report, encoding="utf-8")


def fill(request: PruneRequest, context: StageContext) -> None:
    """Write the smaller checkpoint, its plan and pruning.json (what each layer paid); interrupted, it goes on."""
    from infra.models.import_model import hand_on_tokenizer
    from tasks.stages.walk_processes import run_walk

    store = context.store
    source = store.path(request.checkpoint)
    if request.rebuilds_vocabulary:
        hand_on_tokenizer(source, context.folder)
        _rebuild(request, context, source)
        return
    if request.trains:
        work = partial(_train, request, context, source)
    else:
        assert request.calibration is not None, "a method that does not train looks at calibration windows"
        calibration = store.path(request.calibration)
        statistics, orders = (store.path(ref) if ref else None for ref in (request.statistics, request.orders))
        job = _Job(request, source, calibration, statistics, orders, context.folder, store.scratch(context.ref))
        work = partial(run_walk, context, job)
    with something_to_save():
        work()
    hand_on_tokenizer(source, context.folder)


def _train(request: PruneRequest, context: StageContext, source: Path) -> None:
    """Prune by a method that trains meanwhile, in this process; killed, it goes on at its last training checkpoint."""
    from infra.models.import_model import load_tokenizer
    from pruning.checkpoints.load_check import check_saved
    from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
    from pruning.checkpoints.surgery import shrink_
    from pruning.recovery import RecoveryInputs
    from pruning.training.options import TrainingRun

    model, config, out = load_checkpoint(source), request.typed_config, context.folder
    read = read_data(request.module, config, context.run_context.sources)
    pruned = request.module.train(
        model,
        load_tokenizer(source),
        RecoveryInputs(identity=repr(request.sources), **read),
        config,
        TrainingRun(context.store.scratch(context.ref), context.place.device, context.progress, context.curves),
    )
    shrink_(model.cpu(), pruned.plan)
    before = load_plan(source)
    save_checkpoint(model, None, out, pruned.plan if before is None else before.compose(pruned.plan))
    check_saved(out, model)
    (out / "pruning.json").write_text(pruned.model_dump_json(indent=1, exclude={"plan"}), encoding="utf-8")


def _rebuild(request: PruneRequest, context: StageContext, source: Path) -> None:
    """Make the vocabulary smaller; the tokenizer as it was lies in the folder already."""
    from infra.models.import_model import load_tokenizer

    config, out = request.typed_config, context.folder
    texts = read_data(request.module, config, context.run_context.sources)["texts"]
    smaller = request.module.rebuild(source, out, load_tokenizer, texts, config, context.progress)
    (out / "pruning.json").write_text(smaller.model_dump_json(indent=1), encoding="utf-8")


def _devices(request: PruneRequest) -> Devices:
    if request.rebuilds_vocabulary:
        return "none"
    return "all" if request.trains else "walk"


def _imports(request: PruneRequest) -> tuple[str, ...]:
    if request.rebuilds_vocabulary:
        return ("datasets", "pruning.vocabulary.cut", "pruning.modeling.modeling_slimline", _TOKENIZERS)
    if request.trains:
        return ("datasets", "peft", "pruning.checkpoints.load_check", "transformers.trainer", _TOKENIZERS)
    return ("pruning.layerwise.streaming", "pruning.layerwise.split_search", _TOKENIZERS)


prune = stage("prune", fill, devices=_devices, imports=_imports)
