"""The two halves of a decoder layer: what their output linears are given, and what their outputs add to the stream.

Shapes: B samples, L tokens per sample, C residual stream, I input features of the output linear, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pruning.families.experts import experts_module

if TYPE_CHECKING:
    from pruning.families.family import ModelFamily

SubLayerKind = Literal["attention", "mlp"]
KINDS: tuple[SubLayerKind, ...] = ("attention", "mlp")


def output_linear(family: ModelFamily, layer: nn.Module, kind: SubLayerKind, expert: int | None = None) -> nn.Linear:
    """The linear whose output, perhaps normed or multiplied, joins the residual stream: o_proj or down_proj, that of an
    expert if the layer has experts (then as a view, see `families.experts`)."""
    if expert is not None:
        return experts_module(family, layer).output_linear(expert)
    return family.o_proj(layer) if kind == "attention" else family.down_proj(layer)


def input_norm(family: ModelFamily, layer: nn.Module, kind: SubLayerKind) -> nn.Module | None:
    """The norm before a sub-layer; None if it reads the stream itself. Parallel sub-layers may share one."""
    name = family.attention_norm_name if kind == "attention" else family.mlp_norm_name
    return None if name is None else layer.get_submodule(name)


def output_norm(family: ModelFamily, layer: nn.Module, kind: SubLayerKind) -> nn.Module | None:
    """The norm between a sub-layer's output linear and the stream, if there is one."""
    name = family.attention_output_norm_name if kind == "attention" else family.mlp_output_norm_name
    return None if name is None else layer.get_submodule(name)


def residual_multiplier(family: ModelFamily, layer: nn.Module) -> float | None:
    """What the outputs of a layer's sub-layers are multiplied with, None for as they are."""
    name = family.residual_multiplier_name
    return None if name is None else float(getattr(layer, name))


def output_inputs(
    family: ModelFamily, layer: nn.Module, kind: SubLayerKind, stream_BLC: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """The inputs (B, L, I) of the output linear, from the residual stream; the linear itself is not run. Experts have
    inputs of their own: see `sub_layer_output`.

    stream_BLC: before the layer, or for an MLP that is not parallel to the attention, after the attention's output has
    joined it. kwargs: the keyword arguments that the model gives the layer (mask, rotary tables, positions).
    """
    read_BLC = read_by(family, layer, kind, stream_BLC)
    if kind == "attention":
        module = family.attention(layer)
        with _without(module, family.o_name):
            attention_BLI: Tensor = module(hidden_states=read_BLC, **kwargs)[0]
            return attention_BLI
    if not family.mlp_name:
        activation: Callable[[Tensor], Tensor] = getattr(layer, family.activation_name)
        return activation(family.linears(layer)["up"](read_BLC))
    module = family.mlp(layer)
    with _without(module, family.down_name):
        channels_BLI: Tensor = module(read_BLC)
        return channels_BLI


def read_by(family: ModelFamily, layer: nn.Module, kind: SubLayerKind, stream_BLC: Tensor) -> Tensor:
    """What a sub-layer reads of the stream: through the norm before it, if there is one."""
    norm = input_norm(family, layer, kind)
    return stream_BLC if norm is None else norm(stream_BLC)


def sub_layer_output(
    family: ModelFamily, layer: nn.Module, kind: SubLayerKind, stream_BLC: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """What a sub-layer gives to be joined, (B, L, C): of its output linear, or of its experts together."""
    if kind == "mlp" and family.has_experts(layer):
        output_BLC: Tensor = family.mlp(layer)(read_by(family, layer, kind, stream_BLC))
        return output_BLC
    linear: Callable[[Tensor], Tensor] = output_linear(family, layer, kind)
    return linear(output_inputs(family, layer, kind, stream_BLC, kwargs))


def join(family: ModelFamily, layer: nn.Module, kind: SubLayerKind, stream_BLC: Tensor, output_BLC: Tensor) -> Tensor:
    """The stream after the output of a sub-layer's output linear has joined it: the one place that says how."""
    norm, multiplier = output_norm(family, layer, kind), residual_multiplier(family, layer)
    if norm is not None:
        output_BLC = norm(output_BLC)
    if multiplier is not None:
        output_BLC = output_BLC * multiplier
    return stream_BLC + output_BLC


def output_scale(family: ModelFamily, layer: nn.Module, kind: SubLayerKind) -> Tensor | None:
    """How much each output of an output linear counts in the stream, (C,) float32: the gain of the norm behind it,
    times the multiplier. None where there is neither."""
    norm, multiplier = output_norm(family, layer, kind), residual_multiplier(family, layer)
    if norm is None:
        if multiplier is None:
            return None
        linear = output_linear(family, layer, kind)
        return torch.full((linear.out_features,), multiplier, device=linear.weight.device)
    gain_C = norm.get_parameter("weight").detach().float() + family.norm_offset
    return gain_C if multiplier is None else gain_C * multiplier


@torch.no_grad()
def token_weights(family: ModelFamily, layer: nn.Module, kind: SubLayerKind, inputs_BLI: Tensor) -> Tensor | None:
    """How much an error of the output linear counts at each token, (B, L) float32; None for the same at all.

    A norm behind the linear divides by the root mean square of its output. With that frozen at what the linear gives
    now, squared errors in the stream are those of the linear times 1 / mean square (and `output_scale` squared).
    """
    norm = output_norm(family, layer, kind)
    if norm is None:
        return None
    output_BLC = output_linear(family, layer, kind)(inputs_BLI).float()
    epsilon = float(getattr(norm, family.norm_epsilon_name))
    weights_BL: Tensor = 1 / (output_BLC.square().mean(-1) + epsilon)
    return weights_BL


@torch.no_grad()
def silence_(family: ModelFamily, layer: nn.Module, kind: SubLayerKind) -> None:
    """Let a sub-layer add nothing to the residual stream."""
    if kind == "mlp" and family.has_experts(layer):
        experts_module(family, layer).module.down_proj.zero_()
    else:
        linear = output_linear(family, layer, kind)
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
            output_BLC = sub_layer_output(family, layer, kind, before_BLC, kwargs)
            after_BLC = join(family, layer, kind, after_BLC, output_BLC)
    return after_BLC


def finish_logits(family: ModelFamily, config: Any) -> Callable[[Tensor], Tensor] | None:
    """What becomes of the head's outputs, (..., V), before they are logits; None where they are."""
    divisor = family.logits_divisor_field and getattr(config, family.logits_divisor_field)
    cap = family.logits_cap_field and getattr(config, family.logits_cap_field)
    if divisor:
        return lambda logits: logits / divisor
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    return None


@contextmanager
def _without(module: nn.Module, linear_name: str) -> Iterator[None]:
    """The module with its output linear taken out, so that it returns what that linear would get."""
    linear = getattr(module, linear_name)
    setattr(module, linear_name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, linear_name, linear)


def output_name(family: ModelFamily, layer: int, kind: SubLayerKind, expert: int | None = None) -> str:
    """Dotted name of an output linear: "model.layers.3.mlp.down_proj", "model.layers.3.mlp.experts.5.down_proj"."""
    block, leaf = (family.attention_name, family.o_name) if kind == "attention" else (family.mlp_name, family.down_name)
    if expert is not None:
        assert family.experts is not None
        leaf = f"{family.experts.module_name}.{expert}.{leaf}"
    return ".".join(part for part in (family.layers_path, str(layer), block, leaf) if part)
