"""Stage: speed and size of one checkpoint, timed turn and turn about with the dense one."""

from __future__ import annotations

from evaluation.profile_config import ProfileConfig
from tasks.requests import ProfileRequest
from tasks.stage import Bench, stage


def fill(request: ProfileRequest, bench: Bench) -> None:
    """Write report.json."""
    from evaluation.peak_memory import peak_resident_gib
    from evaluation.profiler import profile as measure
    from pruning.checkpoint import load_checkpoint
    from pruning.folders import class_of_folder

    settings = ProfileConfig.model_validate(request.settings)
    folder, reference = bench.store.path(request.checkpoint), request.reference
    report = measure(
        load_checkpoint(folder, **bench.place.load),
        settings,
        reference=load_checkpoint(bench.store.path(reference), **bench.place.load) if reference else None,
        device=bench.place.device,
        progress=bench.progress,
    )
    if report.peak_memory_gib is None:
        model_class = class_of_folder(folder)  # stock or ours: whatever code lies in the folder is not run
        peak = peak_resident_gib(folder, settings, f"{model_class.__module__}:{model_class.__qualname__}")
        report = report.model_copy(update={"peak_memory_gib": peak.model_gib})
    (bench.folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")


profile = stage("profile", fill, devices="one", imports=("evaluation.profiler", "pruning.checkpoint"))
