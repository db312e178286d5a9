"""uniform: what comes out is a model of transformers' own class, of any family and by any method."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from infra.registry import load
from pruning.checkpoints.surgery import shrink_
from pruning.families import FAMILIES, shapes
from pruning.walk.state import Pruned
from tests.pruning.captured import prune_copy
from tests.tiny import FAMILIES as TINY
from tests.tiny import tiny_model


def cut(family: str, method: str, **options: Any) -> tuple[PreTrainedModel, Pruned]:
    module = load("pruning.methods", method, "method")
    model = tiny_model(family, hidden=64, intermediate=384)
    _, pruned = prune_copy(model, module.Config(uniform=True, **options), method=module)
    shrink_(model, pruned.plan)
    return model, pruned


@pytest.mark.parametrize("family", TINY)
def test_equal_layers_are_the_stock_class(family: str) -> None:
    model, pruned = cut(family, "magnitude", sparsity=0.5, channel_multiple=4)
    row = next(row for row in FAMILIES if row.name == family.partition("-")[0])
    assert type(model).__name__ == row.architectures[0]
    (shape,) = set(shapes(model))
    assert shape.intermediate_size % 4 == 0
    assert shape.num_heads < 8 or family == "opt"  # whose stock class divides the hidden size by the heads
    assert abs(pruned.achieved_sparsity - 0.5) <= 0.005


def test_slimgpt_tries_only_splits_that_come_to_something_else() -> None:
    model, pruned = cut("llama", "slimgpt", sparsity=0.25, channel_multiple=2)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert abs(pruned.achieved_sparsity - 0.25) <= 0.005
    assert pruned.split_kl is not None
    assert len(pruned.split_kl) < 4
