"""The layer walk: the only loop over decoder layers in the project.

Every sub-layer is computed once. For attention and then the MLP of each layer the walk captures the inputs of the
output linear (o_proj, down_proj) for all calibration tokens, hands the linear and its Hessian to the caller, who may
change the weight in place, and adds the linear's output, with whatever weight it now has, to the residual stream.

Shapes: N samples, L tokens per sample, I input features of the linear.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pruning.families import ModelFamily
from pruning.hessian import Hessian, HessianAccumulator

SubLayerKind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class SubLayer:
    """What the walk yields: change `linear.weight` in place before the walk goes on, or leave it.

    layer: index. kind: which half of the layer. name: dotted name of the linear. hessian: of the linear's inputs,
    as the layers before it now give them. heldout: the same over the held-out samples, if there are any.
    """

    layer: int
    kind: SubLayerKind
    name: str
    linear: nn.Linear
    hessian: Hessian
    heldout: Hessian | None = None


_KINDS: tuple[SubLayerKind, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class WalkOptions:
    """How to run the walk; nothing here changes the answer beyond rounding.

    device: where a layer computes; layers are moved there one at a time and back. batch_size: samples per forward.
    activation_budget_bytes: host or device memory the captured inputs of one linear may take; above it they are
    computed a second time instead of kept. None: always kept.
    """

    device: torch.device
    batch_size: int = 8
    activation_budget_bytes: int | None = None


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


def output_name(family: ModelFamily, layer: int, kind: SubLayerKind) -> str:
    """Dotted name of a sub-layer's output linear: "model.layers.3.mlp.down_proj"."""
    leaf = (
        f"{family.attention_name}.{family.o_name}" if kind == "attention" else f"{family.mlp_name}.{family.down_name}"
    )
    return f"{family.layers_path}.{layer}.{leaf}"


@torch.no_grad()
def walk_layers(
    model: nn.Module, family: ModelFamily, input_ids_NL: Tensor, options: WalkOptions, *, num_heldout: int = 0
) -> Generator[SubLayer, None, Tensor]:
    """Walk all decoder layers over the calibration tokens, yielding attention then MLP of each (see SubLayer).

    input_ids_NL: (N, L) int64; the last `num_heldout` samples take part in the forward but in no Hessian. Returns
    (as the generator's value) the residual stream after the last layer, (N, L, C), before the final norm. If the caller
    changes weights between the yields, later layers see the changed outputs (error propagation); a caller who changes
    nothing gets the statistics of the model as it is.
    """
    stream_NLC, kwargs_per_layer = _embed(model, family, input_ids_NL)
    training = model.training
    model.eval()
    try:
        for index, layer in enumerate(family.layers(model)):
            with moved(layer, options.device):
                kwargs = _to_device(kwargs_per_layer[index], options.device)
                for kind in _KINDS:
                    yield from _walk_sub_layer(layer, family, index, kind, stream_NLC, kwargs, options, num_heldout)
    finally:
        model.train(training)
    return stream_NLC


def _walk_sub_layer(
    layer: nn.Module,
    family: ModelFamily,
    index: int,
    kind: SubLayerKind,
    stream_NLC: Tensor,
    kwargs: dict[str, Any],
    options: WalkOptions,
    num_heldout: int,
) -> Iterator[SubLayer]:
    """Capture, yield, add: one forward of the sub-layer; `stream_NLC` is updated in place."""
    module, linear_name, inputs_of = _parts(layer, family, kind, kwargs)
    linear = getattr(module, linear_name)
    name = output_name(family, index, kind)
    seen = HessianAccumulator(linear.in_features, device=options.device)
    heldout = HessianAccumulator(linear.in_features, device=options.device) if num_heldout else None
    calibration_NLC, heldout_MLC = stream_NLC.tensor_split([len(stream_NLC) - num_heldout])
    batches = [(batch, seen) for batch in torch.split(calibration_NLC, options.batch_size)]
    if heldout is not None:
        batches += [(batch, heldout) for batch in torch.split(heldout_MLC, options.batch_size)]
    num_bytes = stream_NLC[..., 0].numel() * linear.in_features * stream_NLC.element_size()
    keep = options.activation_budget_bytes is None or num_bytes <= options.activation_budget_bytes
    kept: list[Tensor] = []
    for batch, accumulator in batches:
        inputs_BLI = inputs_of(batch.to(options.device))
        accumulator.add(inputs_BLI)
        if keep:
            kept.append(inputs_BLI.to(stream_NLC.device))
    yield SubLayer(index, kind, name, linear, seen.finish(name), heldout.finish(name) if heldout else None)
    kept.reverse()  # so that each batch's inputs are freed as soon as they are added
    for batch, _ in batches:
        inputs_BLI = kept.pop().to(options.device) if keep else inputs_of(batch.to(options.device))
        batch += linear(inputs_BLI).to(batch.device)


def _parts(
    layer: nn.Module, family: ModelFamily, kind: SubLayerKind, kwargs: dict[str, Any]
) -> tuple[nn.Module, str, Callable[[Tensor], Tensor]]:
    """The sub-layer's module, the name of its output linear, and the function from residual stream to its inputs."""
    if kind == "attention":
        module, norm, linear_name = family.attention(layer), family.attention_norm(layer), family.o_name

        def inputs_of(stream_BLC: Tensor) -> Tensor:
            with _without(module, linear_name):
                inputs_BLI: Tensor = module(hidden_states=norm(stream_BLC), **kwargs)[0]
                return inputs_BLI
    else:
        module, norm, linear_name = family.mlp(layer), family.mlp_norm(layer), family.down_name

        def inputs_of(stream_BLC: Tensor) -> Tensor:
            with _without(module, linear_name):
                inputs_BLI: Tensor = module(norm(stream_BLC))
                return inputs_BLI

    return module, linear_name, inputs_of


@contextmanager
def moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device` for the length of the block, then back where it was."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@contextmanager
def _without(module: nn.Module, linear_name: str) -> Iterator[None]:
    """The module with its output linear taken out, so that it returns what that linear would get."""
    linear = getattr(module, linear_name)
    setattr(module, linear_name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, linear_name, linear)


def _embed(model: nn.Module, family: ModelFamily, input_ids_NL: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The residual stream before layer 0 (N, L, C), and each layer's keyword arguments for one sample.

    Runs the model's own forward with recorders for layers, so masks and rotary tables are the model's, not ours;
    all samples have the same length and no padding, so one sample's arguments serve every batch.
    """
    decoder, layers = family.decoder(model), family.layers(model)
    layers_name = family.layers_path.rpartition(".")[2]
    recorders = nn.ModuleList(_Recorder(layer) for layer in layers)
    device = family.embeddings(model).weight.device
    stream: list[Tensor] = []
    setattr(decoder, layers_name, recorders)
    try:
        for sample_L in input_ids_NL.to(device):
            decoder(input_ids=sample_L.unsqueeze(0), use_cache=False)
            first = recorders[0]
            assert isinstance(first, _Recorder)
            assert first.first_input is not None
            stream.append(first.first_input)
    finally:
        setattr(decoder, layers_name, layers)
    kwargs_per_layer = [recorder.kwargs for recorder in recorders if isinstance(recorder, _Recorder)]
    return torch.cat(stream), kwargs_per_layer


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    return value
