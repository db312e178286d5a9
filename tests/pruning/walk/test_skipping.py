"""The loss without a block is the loss of the model that does not have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.families import family_of, forward
from pruning.families.forward import KINDS, silence_
from pruning.ranking.depth import blocks_of
from pruning.walk import streams
from pruning.walk.skipping import Block, SubLayers, influences, losses_without
from tests.pruning.captured import CPU
from tests.tiny import FAMILIES, random_ids, tiny_model


def without(family: str, *blocks: Block) -> PreTrainedModel:
    model = tiny_model(family)
    for block in blocks:
        for kind in block.kinds:
            silence_(family_of(model), family_of(model).layers(model)[block.layer], kind)
    return model


@torch.no_grad()
def loss(model: PreTrainedModel, ids_NL: torch.Tensor) -> float:
    return float(model(ids_NL, labels=ids_NL).loss)


@pytest.mark.parametrize("unit", ["layer", "sub_layer"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "olmo2", "granite"])
def test_equals_the_model_without_it(family: str, unit: Any) -> None:
    model = tiny_model(family)
    ids_NL = random_ids(model, 4, 15)
    gone = Block(1, ("mlp",)) if unit == "sub_layer" else Block(1)
    blocks = [block for block in blocks_of(3, unit) if block != gone]
    options = replace(CPU, activation_budget_bytes=0)
    for removed in ((), (gone,)):
        found = losses_without(ResidentDecoder(model), ids_NL, options, blocks, SubLayers(removed))
        assert list(found) == blocks
        for block, value in found.items():
            assert value == pytest.approx(loss(without(family, *removed, block), ids_NL), rel=1e-5)


def test_costs_half_a_forward_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", layers=6)
    count = 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal count
        count += bool(args[4])
        return forward.layer_output(*args)

    monkeypatch.setattr(streams, "layer_output", counted)
    losses_without(ResidentDecoder(model), random_ids(model, 3, 8), CPU, blocks_of(6, "layer"), SubLayers())
    assert count <= 6 * 7 / 2  # of 36 without sharing, in one batch


@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_influence_is_one_minus_the_cosine_of_input_and_output(family: str) -> None:
    model = tiny_model(family)
    ids_NL = random_ids(model, 4, 15)
    with torch.no_grad():
        states = model(ids_NL, output_hidden_states=True).hidden_states
    last: list[torch.Tensor] = []
    layers = family_of(model).layers(model)
    handle = layers[2].register_forward_hook(lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids_NL)
    handle.remove()
    ends = [*states[:3], last[0].reshape(states[0].shape)]  # the last hidden state has the final norm on it
    found = influences(ResidentDecoder(model), ids_NL, CPU, blocks_of(3, "layer"), SubLayers())
    for block, value in found.items():
        cosine = torch.nn.functional.cosine_similarity(ends[block.layer], ends[block.layer + 1], dim=-1).mean()
        assert value == pytest.approx(1 - float(cosine), abs=1e-5)


def test_influence_of_sub_layers() -> None:
    model = tiny_model("llama")
    ids_NL = random_ids(model, 4, 15)
    seen: dict[str, torch.Tensor] = {}
    layer = family_of(model).layers(model)[1]
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    with torch.no_grad():
        after = model(ids_NL, output_hidden_states=True).hidden_states[2]
    for handle in handles:
        handle.remove()
    found = influences(ResidentDecoder(model), ids_NL, CPU, blocks_of(3, "sub_layer"), SubLayers())
    before, middle = seen["input_layernorm"], seen["post_attention_layernorm"]
    for kind, (one, other) in zip(KINDS, ((before, middle), (middle, after)), strict=True):
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=-1).mean()
        assert found[Block(1, (kind,))] == pytest.approx(1 - float(cosine), abs=1e-5)
