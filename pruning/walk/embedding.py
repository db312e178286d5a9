"""The way into the layers: what the model makes of token ids before its first layer, and what it hands to each layer.

Shapes: N samples, L tokens per sample, C residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pruning.families import ModelFamily
    from pruning.walk.activations import Activations


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
    kwargs: list[dict[str, Any]] = []
    for start, stop in batches:
        samples = [embed(model, family, ids_NL[n : n + 1]) for n in range(start, stop)]
        stream.put(start, torch.cat([first_1LC for first_1LC, _ in samples]))
        kwargs = samples[-1][1]
    return [to_device(layer_kwargs, device) for layer_kwargs in kwargs]


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


def embed(model: nn.Module, family: ModelFamily, input_ids_1L: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The residual stream of one sample before layer 0 (1, L, C), and the keyword arguments of each layer.

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
        decoder(input_ids=input_ids_1L.to(device), use_cache=False)
    finally:
        for module in training:
            module.training = True
        setattr(decoder, layers_name, layers)
    first_1LC = recorders[0].first_input
    assert first_1LC is not None
    return first_1LC, [recorder.kwargs for recorder in recorders]


def to_device(value: Any, device: torch.device) -> Any:
    """Keyword arguments of a layer, with their tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    return value
