"""Gradients layer by layer are those of `loss.backward()` on the whole model."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.errors import PruningError
from pruning.families import family_of
from pruning.gradients.backward import needed_bytes, walk_backwards
from pruning.walk.skipping import Block, SubLayers
from tests.pruning.captured import CPU
from tests.tiny import FAMILIES, random_ids, tiny_model


def whole_model_gradients(model: PreTrainedModel, ids_NL: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    model.zero_grad()
    model(ids_NL, labels=ids_NL).loss.backward()
    found = [
        {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
        for layer in family_of(model).layers(model)
    ]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("family", "in_files"),
    [*product(FAMILIES, (False, True)), *((family, False) for family in ("gemma2", "phi3", "olmo2", "granite"))],
)
def test_equal_to_the_whole_model(family: str, in_files: bool) -> None:
    model = tiny_model(family)
    ids_NL = random_ids(model, 5, 17)  # batches of 3 and 2
    expected = whole_model_gradients(model, ids_NL)
    options = replace(CPU, activation_budget_bytes=0) if in_files else CPU
    shares: list[float] = []
    seen = []
    for found in walk_backwards(ResidentDecoder(model), ids_NL, options, progress=shares.append):
        seen.append(found.layer)
        assert found.gradients.keys() == expected[found.layer].keys()
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(gradient, expected[found.layer][name], rtol=1e-4, atol=1e-6)
    assert seen == [2, 1, 0]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("block", [Block(1), Block(1, ("attention",)), Block(2, ("mlp",))])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_of_a_model_without_a_block(family: str, block: Block) -> None:
    model = tiny_model(family)
    ids_NL = random_ids(model, 3, 12)
    masked = tiny_model(family)
    silenced = family_of(masked).layers(masked)[block.layer]
    for kind in block.kinds:
        linear = family_of(masked).o_proj(silenced) if kind == "attention" else family_of(masked).down_proj(silenced)
        linear.weight.data.zero_()
        if linear.bias is not None:
            linear.bias.data.zero_()
    expected = whole_model_gradients(masked, ids_NL)
    walked = {
        found.layer: found.gradients
        for found in walk_backwards(ResidentDecoder(model), ids_NL, CPU, present=SubLayers([block]))
    }
    assert set(walked) == ({0, 1, 2} if len(block.kinds) == 1 else {0, 2})
    torch.testing.assert_close(walked[0], expected[0], rtol=1e-4, atol=1e-6)


def test_float16_is_computed_in_float32() -> None:
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    wide = tiny_model("llama")
    wide.load_state_dict(model.state_dict())
    ids_NL = random_ids(model, 2, 9)
    expected = whole_model_gradients(wide.float(), ids_NL)
    for found in walk_backwards(ResidentDecoder(model), ids_NL, CPU):
        for name, gradient in found.gradients.items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected[found.layer][name], rtol=0.02, atol=1e-3)


def test_bad_input_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(PruningError, match="two tokens at least; raise num_samples or seq_len"):
        next(walk_backwards(ResidentDecoder(model), random_ids(model, 2, 1), CPU))
    family_of(model).down_proj(family_of(model).layers(model)[1]).weight.data[0, 0] = float("nan")
    with pytest.raises(PruningError, match=r"gradient of layer 2, .* is not finite"):
        list(walk_backwards(ResidentDecoder(model), random_ids(model, 2, 8), CPU))


def test_what_a_layer_needs() -> None:
    # a layer of a 7B in bfloat16: 0.4 GB of weights, 0.8 GB of gradients, and one sample of 2048 tokens
    needed = needed_bytes(202_383_360, torch.bfloat16, 2048, 4096)
    assert 1.5e9 < needed < 1.8e9
    assert needed_bytes(10, torch.float16, 0, 0) == needed_bytes(10, torch.float32, 0, 0)
