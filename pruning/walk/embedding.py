"""The way into the layers: what the model makes of token ids before its first layer, and what it hands to each layer.

Shapes: N samples, B samples of one batch, L tokens per sample, C residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pruning.activations.activations import Activations
    from pruning.families import ModelFamily


@torch.no_grad()
def enter(
    model: nn.Module,
    family: ModelFamily,
    ids_NL: Tensor,
    batches: Sequence[tuple[int, int]],
    stream: Activations,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Put the residual stream before layer 0 of all batches into `stream`; returns each layer's keyword arguments."""
    for start, stop in batches:
        stream.put(start, embed(model, family, ids_NL[start:stop])[0])
    return moved(embed(model, family, ids_NL[:1])[1], device) if batches else []


def spans(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """First sample and end of each batch."""
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the keyword arguments the model gives it and passes the stream on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.first_input: Tensor | None = None
        # model code reads e.g. `decoder_layer.attention_type` to choose the mask
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs, self.first_input = kwargs, hidden_states
        return hidden_states


def embed(model: nn.Module, family: ModelFamily, input_ids_BL: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The residual stream of some samples before layer 0 (B, L, C), and the keyword arguments of each layer.

    Runs the model's own forward with recorders for layers, so masks and rotary tables are the model's, not ours;
    all samples have the same length and no padding, so one sample's arguments serve every batch.
    """
    decoder, layers = family.decoder(model), family.layers(model)
    layers_name = family.layers_path.rpartition(".")[2]
    recorders = [_Recorder(layer) for layer in layers]
    device = family.embeddings(model).weight.device
    setattr(decoder, layers_name, nn.ModuleList(recorders))
    training = [module for module in decoder.modules() if module.training]
    try:
        decoder.eval()  # dropout would be calibration noise
        decoder(input_ids=input_ids_BL.to(device), use_cache=False)
    finally:
        for module in training:
            module.training = True
        setattr(decoder, layers_name, layers)
    first_BLC = recorders[0].first_input
    assert first_BLC is not None
    return first_BLC, [recorder.kwargs for recorder in recorders]


def moved(kwargs: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Keyword arguments of all layers, with their tensors on `device`; those that layers share are moved once."""
    there: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in there:
                there[id(value)] = value.to(device)
            return there[id(value)]
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(move(item) for item in value)
        return value

    return [move(layer_kwargs) for layer_kwargs in kwargs]
