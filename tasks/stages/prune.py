"""Stage: a checkpoint made smaller by a pruning method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.execution.context import StageContext
from tasks.execution.interrupts import something_to_save
from tasks.execution.stage import stage
from tasks.requests import PruneRequest

if TYPE_CHECKING:
    from pruning.walk.sequential import WalkOptions
    from tasks.execution.progress import Progress


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

    def __call__(self, options: WalkOptions, progress: Progress) -> None:
        from pruning.calibration import CalibrationSet
        from pruning.layerwise.streaming import prune_checkpoint

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
    calibration = store.path(request.calibration)
    statistics, orders = (store.path(ref) if ref else None for ref in (request.statistics, request.orders))
    job = _Job(request, source, calibration, statistics, orders, context.folder, store.scratch(context.ref))
    with something_to_save():
        run_walk(context, job)
    hand_on_tokenizer(source, context.folder)


prune = stage(
    "prune",
    fill,
    devices="walk",
    imports=(
        "pruning.layerwise.streaming",
        "pruning.layerwise.split_search",
        "transformers.models.auto.tokenization_auto",
    ),
)
