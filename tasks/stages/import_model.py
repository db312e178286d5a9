"""Stage: a model from wherever it is to a local safetensors checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import SourceInvalid
from infra.models.import_model import import_model as import_into
from pruning.errors import PruningError
from tasks.execution.context import StageContext
from tasks.execution.stage import stage
from tasks.requests import ImportRequest

log = logging.getLogger("slimline")


def fill(request: ImportRequest, context: StageContext) -> None:
    """Write the checkpoint, clean; every tensor is checked for NaN on the way."""
    from pruning.checkpoints.clean import clean_
    from pruning.checkpoints.folder import with_own_modelling_file_

    located = context.run_context.sources.find(request.model_id, "model", revision=request.revision)
    trust = request.trust_remote_code
    with _said_of(located.folder or located.repo_id, context.folder):
        import_into(located, context.folder, request.dtype, trust_remote_code=trust, progress=context.progress)
        for change in clean_(context.folder):
            log.warning("%s: cleaned on import: %s", request.model_id, change)
    with_own_modelling_file_(context.folder)


@contextmanager
def _said_of(model: Path | str, copy: Path) -> Iterator[None]:
    """What is wrong with files that were copied is wrong with the model's: those are the user's to mend."""
    try:
        yield
    except (SourceInvalid, PruningError) as error:
        if str(copy) not in str(error):
            raise
        raise type(error)(str(error).replace(str(copy), str(model))) from error


import_model = stage(
    "import-model",
    fill,
    devices="none",
    imports=(
        "infra.models.import_model",
        "pruning.checkpoints.clean",
        "pruning.modeling.modeling_slimline",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    ),
)
