"""Stage: a model from wherever it is to a local safetensors checkpoint."""

from __future__ import annotations

from infra.models import import_model as import_into
from tasks.requests import ImportRequest
from tasks.stage import Bench, stage


def fill(request: ImportRequest, bench: Bench) -> None:
    """Write the checkpoint; every tensor is checked for NaN on the way."""
    located = bench.workplace.sources.find(request.model_id, "model", revision=request.revision)
    import_into(located, bench.folder, request.dtype, progress=bench.progress)


import_model = stage(
    "import-model",
    fill,
    devices="none",
    imports=("infra.models", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
)
