"""The halves of a layer give their output linears what the model's own forward gives them, in every family."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from pruning.families.forward import KINDS, join, output_inputs, output_linear
from tests.tiny import FAMILIES, LATER_FAMILIES, random_ids, random_plan, tiny_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*FAMILIES, *LATER_FAMILIES)},
    "mistral-sliding": ("mistral", {"sliding_window": 5}),
    "gemma-one-kv-head": ("gemma", {"kv_heads": 1}),
    "phi-2-rotary": ("phi", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.4}, "hidden": 80}),
    "opt-no-bias": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
}


def model_of(name: str) -> PreTrainedModel:
    family, config = MODELS[name]
    return tiny_model(family, **config)


@dataclass
class Seen:
    """What a layer got and gave in the model's own forward, and what its output linears got."""

    before_BLC: Tensor = field(init=False)
    after_BLC: Tensor = field(init=False)
    kwargs: dict[str, Any] = field(init=False)
    inputs: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def watched(model: PreTrainedModel, ids_BL: Tensor) -> tuple[list[Seen], Tensor]:
    """What all layers see, and the logits."""
    family, handles = family_of(model), []
    seen = [Seen() for _ in family.layers(model)]

    def enter(layer: Seen, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        layer.before_BLC, layer.kwargs = args[0], kwargs

    def leave(layer: Seen, output: Tensor) -> None:
        layer.after_BLC = output

    for module, entry in zip(family.layers(model), seen, strict=True):
        handles.append(module.register_forward_pre_hook(lambda m, a, k, e=entry: enter(e, a, k), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda m, a, o, e=entry: leave(e, o)))
        for kind in KINDS:
            linear = output_linear(family, module, kind)
            handles.append(
                linear.register_forward_pre_hook(lambda m, a, e=entry, k=kind: e.inputs.__setitem__(k, a[0]))
            )
    logits = model(ids_BL, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@torch.no_grad()
def walk(model: PreTrainedModel, stream_BLC: Tensor, kwargs_of: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """A layer walk in its smallest form: the inputs of each layer's output linears, and the stream after it."""
    family, found = family_of(model), []
    for layer, kwargs in zip(family.layers(model), kwargs_of, strict=True):
        before_BLC, inputs = stream_BLC, {}
        for kind in KINDS:
            read_BLC = before_BLC if family.parallel_residual else stream_BLC
            inputs[kind] = output_inputs(family, layer, kind, read_BLC, kwargs)
            output_BLC = output_linear(family, layer, kind)(inputs[kind])
            stream_BLC = join(family, layer, kind, stream_BLC, output_BLC)
        found.append(inputs | {"after": stream_BLC})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_sees_what_the_model_sees(name: str) -> None:
    model = model_of(name)
    seen, logits = watched(model, random_ids(model, batch=3))
    walked = walk(model, seen[0].before_BLC, [layer.kwargs for layer in seen])
    for layer, found in zip(seen, walked, strict=True):
        for kind in KINDS:
            # the MLP of an OPT gets (B * L, C)
            theirs = layer.inputs[kind].reshape(found[kind].shape)
            torch.testing.assert_close(found[kind], theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["after"], layer.after_BLC, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        ours = ResidentDecoder(model).logits_of(torch.device("cpu"))(walked[-1]["after"])
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_from_the_same_stream_the_inputs_are_equal_bit_for_bit(name: str) -> None:
    model = model_of(name)
    family = family_of(model)
    seen, _ = watched(model, random_ids(model))
    for module, layer in zip(family.layers(model), seen, strict=True):
        read_BLC = layer.before_BLC
        for kind in KINDS:
            with torch.no_grad():
                inputs_BLI = output_inputs(family, module, kind, read_BLC, layer.kwargs)
                assert torch.equal(inputs_BLI, layer.inputs[kind].reshape(inputs_BLI.shape))
                if kind == "attention" and not family.parallel_residual:
                    read_BLC = join(family, module, kind, read_BLC, family.o_proj(module)(inputs_BLI))


@pytest.mark.parametrize("name", FAMILIES)
def test_shrunk_layers_too(name: str) -> None:
    model = tiny_model(name)
    shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=2))
    seen, _ = watched(model, random_ids(model))
    walked = walk(model, seen[0].before_BLC, [layer.kwargs for layer in seen])
    for layer, found, shape in zip(seen, walked, shapes(model), strict=True):
        torch.testing.assert_close(found["after"], layer.after_BLC, atol=1e-5, rtol=1e-5)
        assert found["mlp"].shape[-1] == shape.intermediate_size


@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_linear_is_not_run_and_stays_where_it_was(name: str) -> None:
    model = tiny_model(name)
    family, layer = family_of(model), family_of(model).layers(model)[0]
    (seen, *_), _ = watched(model, random_ids(model))
    before = copy.deepcopy(layer.state_dict())
    for kind in KINDS:
        linear = output_linear(family, layer, kind)
        calls: list[nn.Module] = []
        handle = linear.register_forward_hook(lambda module, args, output, calls=calls: calls.append(module))
        with torch.no_grad():
            output_inputs(family, layer, kind, seen.before_BLC, seen.kwargs)
        assert calls == []
        assert output_linear(family, layer, kind) is linear
        handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with pytest.raises(RuntimeError):
        output_inputs(family, layer, "attention", seen.before_BLC[..., 1:], seen.kwargs)
    assert isinstance(output_linear(family, layer, "attention"), nn.Linear), "put back after a failure too"
