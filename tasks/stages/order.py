"""Stage: in which order heads, channels or layers of the dense model go: one ranking serves every sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.execution.context import StageContext
from tasks.execution.interrupts import something_to_save
from tasks.execution.stage import stage
from tasks.requests import OrderRequest

if TYPE_CHECKING:
    from pruning.walk.options import WalkOptions
    from tasks.execution.curves import Curves
    from tasks.execution.progress import Progress


@dataclass(frozen=True)
class _Job:
    """What each process of a ranking does; the leader writes."""

    request: OrderRequest
    source: Path
    statistics: Path | None
    calibration: Path | None
    out: Path
    work: Path

    def __call__(self, options: WalkOptions, progress: Progress, curves: Curves) -> None:
        from pruning.calibration import CalibrationSet
        from pruning.checkpoints.decoder import StreamedDecoder

        self.request.module.order(
            StreamedDecoder(self.source),
            self.request.typed_config,
            self.out,
            statistics=self.statistics,
            calibration=CalibrationSet.load(self.calibration) if self.calibration else None,
            options=options,
            work=self.work,
            progress=progress,
        )


def fill(request: OrderRequest, context: StageContext) -> None:
    """Write one file per site and unit; interrupted, a ranking that measures again after each removal goes on."""
    from tasks.stages.walk_processes import run_walk

    store = context.store
    statistics, calibration = (store.path(ref) if ref else None for ref in (request.statistics, request.calibration))
    work = store.scratch(context.ref)
    job = _Job(request, store.path(request.checkpoint), statistics, calibration, context.folder, work)
    with something_to_save():
        run_walk(context, job)


order = stage(
    "order",
    fill,
    devices="walk",
    # the last one imports all model classes: transformers' lazy attributes are not safe between threads
    imports=("pruning.checkpoints.decoder", "pruning.layerwise.orders", "pruning.modeling.modeling_slimline"),
)
