"""Stage: the dense model's Hessians, for methods that do not propagate errors."""

from __future__ import annotations

from tasks.requests import CaptureRequest
from tasks.stage import Bench, stage


def fill(request: CaptureRequest, bench: Bench) -> None:
    """Write one file of second moments per output linear."""
    from pruning.calibration import CalibrationSet
    from pruning.checkpoint import load_checkpoint
    from pruning.statistics import capture_statistics
    from tasks.walking import walk_options

    model = load_checkpoint(bench.store.path(request.checkpoint))
    calibration = CalibrationSet.load(bench.store.path(request.calibration))
    num_layers = model.config.num_hidden_layers
    capture_statistics(
        model,
        calibration,
        bench.folder,
        walk_options(bench),
        on_layer=lambda layer: bench.progress((layer + 1) / num_layers, f"layer {layer + 1} of {num_layers}"),
    )


capture = stage("capture", fill, devices="one", imports=("pruning.checkpoint", "pruning.statistics"))
