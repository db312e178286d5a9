"""Plans for models of the proportions people have: grouped heads stay in equal groups, single heads go one by one."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pruning.checkpoints.surgery import shrink_
from pruning.families import decoder_parameters, shapes
from pruning.methods.slimgpt import Config
from tests.pruning.captured import logits, prune_copy, windows
from tests.tiny import random_ids, tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

#: family, query heads, kv heads, FFN over hidden as published; head_dim is 2 where the real one is 128
GROUPED: dict[str, tuple[str, int, int, float]] = {
    "Llama-3-8B": ("llama", 32, 8, 14336 / 4096),
    "Mistral-7B": ("mistral", 32, 8, 14336 / 4096),
    "Qwen3-8B": ("qwen3", 32, 8, 12288 / 4096),
    "Qwen2.5-7B": ("qwen2", 28, 4, 18944 / 3584),
    "Gemma-2B": ("gemma", 8, 1, 16384 / 2048),
}
SINGLE: dict[str, tuple[str, int, int, float]] = {
    "Vicuna-7B": ("llama", 32, 32, 11008 / 4096),
    "phi-2": ("phi", 32, 32, 4.0),
    "OPT-6.7B": ("opt", 32, 32, 4.0),
}


def model_of(family: str, heads: int, kv_heads: int, ffn_over_hidden: float) -> PreTrainedModel:
    hidden = 2 * heads
    channels = round(ffn_over_hidden * hidden)
    # a Phi rotates half of a head, and that half must be even
    sizes: dict[str, Any] = (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}} if family == "phi" else {}
    )
    return tiny_model(family, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=2, intermediate=channels, **sizes)


def pruned(dense: PreTrainedModel, **config: Any) -> tuple[PreTrainedModel, Any]:
    return prune_copy(dense, Config(sparsity=0.3, split="equal", **config), windows(dense))


def check(dense: PreTrainedModel, masked: PreTrainedModel, plan: Any) -> None:
    """The asked share is gone, and the smaller model computes what the masked one does."""
    small = copy.deepcopy(masked)
    shrink_(small, plan)
    assert shapes(small) == plan.shapes
    one_channel = decoder_parameters(dense) * 0.002
    assert decoder_parameters(small) == pytest.approx(0.7 * decoder_parameters(dense), abs=one_channel)
    ids_NL = random_ids(dense)
    torch.testing.assert_close(logits(small, ids_NL), logits(masked, ids_NL), atol=1e-5, rtol=1e-5)


# Gemma-2B has one kv head, which can never go
@pytest.mark.parametrize(
    "name, unit", [case for case in product(GROUPED, ("kv_group", "query_head")) if case != ("Gemma-2B", "kv_group")]
)
def test_grouped_heads_stay_in_equal_groups(name: str, unit: str) -> None:
    dense = model_of(*GROUPED[name])
    (source, *_) = shapes(dense)
    masked, outcome = pruned(dense, head_unit=unit)
    for kept in outcome.plan.layers:
        members = {group: [h for h in kept.kept_query_heads if h // source.num_groups == group] for group in range(8)}
        sizes = {len(heads) for group, heads in members.items() if group in kept.kept_kv_heads}
        assert len(sizes) == 1, "every kv head that is left serves as many query heads"
        assert sum(len(heads) for heads in members.values()) == len(kept.kept_query_heads) == kept.shape.num_heads
        if unit == "kv_group":
            assert sizes == {source.num_groups}, "whole groups go"
        else:
            assert len(kept.kept_kv_heads) == source.num_kv_heads, "every kv head stays"
    assert min(kept.shape.num_heads for kept in outcome.plan.layers) < source.num_heads
    check(dense, masked, outcome.plan)


@pytest.mark.parametrize("name", SINGLE)
def test_single_heads_go_one_by_one(name: str) -> None:
    dense = model_of(*SINGLE[name])
    (source, *_) = shapes(dense)
    masked, outcome = pruned(dense)
    counts = [kept.shape.num_heads for kept in outcome.plan.layers]
    assert all(kept.kept_query_heads == kept.kept_kv_heads for kept in outcome.plan.layers)
    assert counts[-1] < counts[0] <= source.num_heads, "the curve removes most at the end"
    assert any(count % 4 for count in counts), "not in groups of four"
    check(dense, masked, outcome.plan)
