"""Stages: a checkpoint as a file for other programs, an artifact of its own; size and speed of such a file."""

from __future__ import annotations

import logging

from evaluation.profile.config import FileProfileConfig
from evaluation.profile.llama_cpp import profile_file as measure
from infra.sources.safe_names import is_repository_id
from tasks.devices.exported import FILE
from tasks.execution.context import StageContext
from tasks.execution.stage import stage
from tasks.requests import ExportRequest, FileProfileRequest

log = logging.getLogger("slimline")


def fill(request: ExportRequest, context: StageContext) -> None:
    """Write model.gguf."""
    from infra.models.licence import licence_of
    from tasks.exporting.gguf import export_gguf, gguf_metadata
    from tasks.recording.lineage import lineage_of

    store = context.store
    lineage = lineage_of(request.checkpoint, store)
    params = {name: value for name, value in lineage.params("").items() if name in ("method", "recovery")}
    made = {name: value for name, value in params.items() if value != "none"}
    source = lineage.made[0].request.get("source") if lineage.made else None
    base = str(source.get("repo_id", "")) if isinstance(source, dict) else ""
    licence = licence_of(store.path(lineage.made[0].ref)) if lineage.made else None
    metadata = gguf_metadata(
        base if is_repository_id(base) and "/" in base else None,
        licence,
        made | {"checkpoint_key": request.checkpoint.key, "sparsity": lineage.sparsity},
    )
    for note in export_gguf(store.path(request.checkpoint), context.folder / FILE, metadata, request.type):
        log.info("%s: %s", request.checkpoint.key, note)


export = stage(
    "export",
    fill,
    devices="none",
    imports=(
        "gguf",
        "pruning.checkpoints.llama_cpp",
        "pruning.modeling.modeling_slimline",
        "transformers.models.auto.tokenization_auto",
    ),
)


def fill_profile(request: FileProfileRequest, context: StageContext) -> None:
    """Write report.json."""
    import torch

    report = measure(
        context.store.path(request.export) / FILE,
        FileProfileConfig.model_validate(request.settings),
        runtime=request.runtime,
        threads=torch.get_num_threads(),
    )
    (context.folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")


#: the device is not used but had, so that nothing else computes meanwhile
profile_file = stage("profile", fill_profile, devices="one", imports=("torch",))
