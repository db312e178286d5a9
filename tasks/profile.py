"""Stage: speed and size of one checkpoint, timed turn and turn about with the dense one."""

from __future__ import annotations

from evaluation.profile_config import ProfileConfig
from tasks.requests import ProfileRequest
from tasks.stage import Bench, stage

_SHARE_OF_TIMING = 0.9
"""The progress at which memory is measured."""


def fill(request: ProfileRequest, bench: Bench) -> None:
    """Write report.json."""
    from evaluation.peak_memory import with_resident_peaks
    from evaluation.profiler import profile as measure
    from pruning.checkpoint import load_checkpoint
    from pruning.folders import class_of_folder

    settings = ProfileConfig.model_validate(request.settings)
    folder, reference, place = bench.store.path(request.checkpoint), request.reference, bench.place
    # the profile knows what to do where the device has no room for both
    on_host = place.load if place.device_map else {"device": "cpu"}
    report = measure(
        load_checkpoint(folder, **place.load),
        settings,
        reference=load_checkpoint(bench.store.path(reference), **on_host) if reference else None,
        device=place.device,
        progress=lambda share, message: bench.progress(_SHARE_OF_TIMING * share, message),
    )
    model_class = class_of_folder(folder)  # stock or ours: whatever code lies in the folder is not run
    report = with_resident_peaks(
        report,
        folder,
        settings,
        model_class=f"{model_class.__module__}:{model_class.__qualname__}",
        progress=lambda share, message: bench.progress(_SHARE_OF_TIMING + (1 - _SHARE_OF_TIMING) * share, message),
    )
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report = report.model_copy(update={"checkpoint_bytes": weights})
    (bench.folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")


profile = stage("profile", fill, devices="one", imports=("evaluation.profiler", "pruning.checkpoint"))
