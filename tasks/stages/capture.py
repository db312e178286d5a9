"""Stage: the dense model's Hessians, for methods that do not propagate errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.execution.context import StageContext
from tasks.execution.stage import stage
from tasks.requests import CaptureRequest

if TYPE_CHECKING:
    from pruning.walk.options import WalkOptions
    from tasks.execution.curves import Curves
    from tasks.execution.progress import Progress


@dataclass(frozen=True)
class _Job:
    """What each process of a capture does; the leader writes."""

    source: Path
    calibration: Path
    out: Path

    def __call__(self, options: WalkOptions, progress: Progress, curves: Curves) -> None:
        from pruning.calibration import CalibrationSet
        from pruning.checkpoints.decoder import StreamedDecoder
        from pruning.layerwise.capture import capture_statistics

        decoder = StreamedDecoder(self.source)
        num_layers = decoder.num_layers
        capture_statistics(
            decoder,
            CalibrationSet.load(self.calibration),
            self.out,
            options,
            on_layer=lambda layer: progress((layer + 1) / num_layers, f"layer {layer + 1} of {num_layers}"),
        )


def fill(request: CaptureRequest, context: StageContext) -> None:
    """Write one file of second moments per output linear."""
    from tasks.stages.walk_processes import run_walk

    store = context.store
    run_walk(context, _Job(store.path(request.checkpoint), store.path(request.calibration), context.folder))


capture = stage(
    "capture",
    fill,
    devices="walk",
    # the last one imports all model classes: transformers' lazy attributes are not safe between threads
    imports=("pruning.checkpoints.decoder", "pruning.layerwise.capture", "pruning.modeling.modeling_slimline"),
)
