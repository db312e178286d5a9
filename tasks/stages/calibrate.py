"""Stage: calibration windows of a text data set, tokenised for one model."""

from __future__ import annotations

from tasks.calibration_data import documents
from tasks.execution.context import StageContext
from tasks.execution.stage import stage
from tasks.requests import CalibrateRequest


def fill(request: CalibrateRequest, context: StageContext) -> None:
    """Write calibration.safetensors and where it came from."""
    from infra.models.import_model import load_tokenizer
    from pruning.calibration import sample_windows

    tokenizer = load_tokenizer(context.store.path(request.checkpoint))
    sample_windows(
        tokenizer,
        documents(request.data, context.run_context.sources, request.join),
        num_samples=request.num_samples,
        seq_len=request.seq_len,
        seed=request.seed,
        num_heldout=request.num_heldout,
        join=request.join,
        source=request.data.protocol,
    ).save(context.folder)


calibrate = stage(
    "calibrate",
    fill,
    devices="none",
    imports=("datasets", "pruning.calibration", "transformers.models.auto.tokenization_auto"),
)
