"""Stage: speed and size of one checkpoint, timed turn and turn about with the dense one."""

from __future__ import annotations

from evaluation.profile.config import ProfileConfig
from tasks.execution.context import StageContext
from tasks.execution.stage import stage
from tasks.requests import ProfileRequest

_SHARE_OF_TIMING = 0.9
"""The progress at which memory is measured."""


def fill(request: ProfileRequest, context: StageContext) -> None:
    """Write report.json."""
    from evaluation.profile.peak_memory import with_resident_peaks
    from evaluation.profile.profiler import profile as measure
    from pruning.checkpoints.folder import class_of_folder
    from pruning.checkpoints.save_load import load_checkpoint

    settings = ProfileConfig.model_validate(request.settings)
    folder, reference, place = context.store.path(request.checkpoint), request.reference, context.place
    # the profile knows what to do where the device has no room for both
    on_host = place.load if place.device_map else {"device": "cpu"}
    report = measure(
        load_checkpoint(folder, **place.load),
        settings,
        reference=load_checkpoint(context.store.path(reference), **on_host) if reference else None,
        device=place.device,
        progress=lambda share, message: context.progress(_SHARE_OF_TIMING * share, message),
    )
    model_class = class_of_folder(folder)  # stock or ours: whatever code lies in the folder is not run
    report = with_resident_peaks(
        report,
        folder,
        settings,
        model_class=f"{model_class.__module__}:{model_class.__qualname__}",
        progress=lambda share, message: context.progress(_SHARE_OF_TIMING + (1 - _SHARE_OF_TIMING) * share, message),
    )
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report = report.model_copy(update={"checkpoint_bytes": weights})
    (context.folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")


profile = stage(
    "profile",
    fill,
    devices="one",
    imports=("evaluation.profile.profiler", "pruning.checkpoints.save_load", "pruning.modeling.modeling_slimline"),
)
