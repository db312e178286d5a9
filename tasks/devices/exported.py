"""A GGUF file that was exported from a checkpoint, as a model: its weights, dequantised, in the checkpoint's class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "model.gguf"
"""The file, in the folder of its artifact."""


def load_gguf(checkpoint: Path, file: Path, **load: Any) -> PreTrainedModel:
    """The model of the checkpoint in the folder `checkpoint` with the weights of `file`, which was exported from it,
    dequantised into the checkpoint's dtype; in eval mode.

    load: device or device_map, as for load_checkpoint. Raises PruningError, InfraError.
    """
    import torch

    from infra.exporting.gguf_file import read_gguf
    from pruning.checkpoints.llama_cpp import llama_cpp_model
    from pruning.checkpoints.save_load import load_checkpoint

    model = load_checkpoint(checkpoint, **load)
    parts = {part.name: part for part in llama_cpp_model(checkpoint).parts if part.source is not None}
    with torch.no_grad():
        for name, values in read_gguf(file, parts):
            part = parts[name]
            model.get_parameter(str(part.source)).copy_(part.back(torch.tensor(values)))
    return model
