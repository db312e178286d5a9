"""The two halves of a decoder layer up to their output linears: what the layer walk computes.

Shapes: B samples, L tokens per sample, C residual stream, I input features of the output linear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pruning.families.family import ModelFamily

SubLayerKind = Literal["attention", "mlp"]
KINDS: tuple[SubLayerKind, ...] = ("attention", "mlp")


def output_linear(family: ModelFamily, layer: nn.Module, kind: SubLayerKind) -> nn.Linear:
    """The linear whose output joins the residual stream: o_proj or down_proj."""
    return family.o_proj(layer) if kind == "attention" else family.down_proj(layer)


def output_inputs(
    family: ModelFamily, layer: nn.Module, kind: SubLayerKind, stream_BLC: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """The inputs (B, L, I) of the output linear, from the residual stream; the linear itself is not run.

    stream_BLC: before the layer, or for an MLP that is not parallel to the attention, after the attention's output has
    joined it. kwargs: the keyword arguments that the model gives the layer (mask, rotary tables, positions).
    """
    if kind == "attention":
        module, norm = family.attention(layer), family.attention_norm(layer)
        with _without(module, family.o_name):
            attention_BLI: Tensor = module(hidden_states=norm(stream_BLC), **kwargs)[0]
            return attention_BLI
    norm = family.mlp_norm(layer)
    if not family.mlp_name:
        activation: Callable[[Tensor], Tensor] = getattr(layer, family.activation_name)
        return activation(family.up_proj(layer)(norm(stream_BLC)))
    module = family.mlp(layer)
    with _without(module, family.down_name):
        channels_BLI: Tensor = module(norm(stream_BLC))
        return channels_BLI


def silence_(linear: nn.Linear) -> None:
    """Let an output linear add nothing to the residual stream."""
    with torch.no_grad():
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()


def layer_output(
    family: ModelFamily,
    layer: nn.Module,
    stream_BLC: Tensor,
    kwargs: dict[str, Any],
    kinds: Collection[SubLayerKind] = KINDS,
) -> Tensor:
    """The residual stream after a layer of which only the sub-layers `kinds` are there; by default, all of it."""
    after_BLC = stream_BLC
    for kind in KINDS:
        if kind in kinds:
            before_BLC = stream_BLC if family.parallel_residual else after_BLC
            inputs_BLI = output_inputs(family, layer, kind, before_BLC, kwargs)
            after_BLC = after_BLC + output_linear(family, layer, kind)(inputs_BLI)
    return after_BLC


@contextmanager
def _without(module: nn.Module, linear_name: str) -> Iterator[None]:
    """The module with its output linear taken out, so that it returns what that linear would get."""
    linear = getattr(module, linear_name)
    setattr(module, linear_name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, linear_name, linear)


def output_name(family: ModelFamily, layer: int, kind: SubLayerKind) -> str:
    """Dotted name of a sub-layer's output linear: "model.layers.3.mlp.down_proj"."""
    block, leaf = (family.attention_name, family.o_name) if kind == "attention" else (family.mlp_name, family.down_name)
    return ".".join(part for part in (family.layers_path, str(layer), block, leaf) if part)
