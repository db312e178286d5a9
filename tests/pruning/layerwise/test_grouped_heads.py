"""Grouped kv heads at the proportions of published models: every kept kv head keeps the same number of query heads."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pruning.allocation.budget import HeadUnit
from pruning.checkpoints.surgery import shrink_
from pruning.families import shapes
from pruning.methods.slimgpt import Config
from tests.pruning.captured import logits, prune_copy, windows
from tests.tiny import random_ids, tiny_model

#: query heads, kv heads, hidden size and FFN as published, all widths divided by 32; Qwen3's heads are wider
GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-8B": ("llama", {"heads": 32, "kv_heads": 8, "hidden": 128, "intermediate": 448}),
    "Mistral-7B": ("mistral", {"heads": 32, "kv_heads": 8, "hidden": 128, "intermediate": 448, "sliding_window": 16}),
    "Qwen2.5-7B": ("qwen2", {"heads": 28, "kv_heads": 4, "hidden": 112, "intermediate": 592}),
    "Qwen3-8B": ("qwen3", {"heads": 32, "kv_heads": 8, "head_dim": 4, "hidden": 128, "intermediate": 384}),
}
SINGLE: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-7B": ("llama", {"heads": 32, "kv_heads": 32, "hidden": 128, "intermediate": 344}),
    "Vicuna-7B": ("llama", {"heads": 32, "kv_heads": 32, "hidden": 128, "intermediate": 344, "seed": 1}),
}


def model_of(name: str) -> PreTrainedModel:
    family, widths = (GROUPED | SINGLE)[name]
    return tiny_model(family, layers=3, **widths)


def pruned_model(name: str, **config: Any) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Any]:
    """Dense, masked, shrunk, outcome."""
    dense = model_of(name)
    calibration = windows(dense, num_samples=4, num_heldout=1, seq_len=32)
    masked, pruned = prune_copy(dense, Config(**config), calibration)
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    return dense, masked, shrunk, pruned


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_stay_equal(name: str, unit: HeadUnit) -> None:
    dense, masked, shrunk, pruned = pruned_model(name, sparsity=0.33, split="equal", head_unit=unit)
    before = shapes(dense)[0]
    fewer = 0
    for kept, after in zip(pruned.plan.layers, shapes(shrunk), strict=True):
        per_kv_head = Counter(before.kv_head_of(head) for head in kept.kept_query_heads)
        assert set(per_kv_head) == set(kept.kept_kv_heads)
        assert set(per_kv_head.values()) == {after.num_groups}
        if unit == "kv_group":
            assert after.num_groups == before.num_groups
            fewer += before.num_kv_heads - after.num_kv_heads
        else:
            assert after.num_kv_heads == before.num_kv_heads
            fewer += before.num_groups - after.num_groups
    assert fewer >= 3
    assert pruned.achieved_sparsity == pytest.approx(0.33, abs=0.002)
    ids_NL = random_ids(dense, 2, 40)
    torch.testing.assert_close(logits(shrunk, ids_NL), logits(masked, ids_NL), atol=1e-4, rtol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(shrunk.generate(ids_NL, **options), shrunk.generate(ids_NL, use_cache=False, **options))


@pytest.mark.parametrize("name", GROUPED)
def test_defaults_measure_and_take_query_heads_from_every_group(name: str) -> None:
    dense, _, shrunk, pruned = pruned_model(name, sparsity=0.25)
    assert len(pruned.split_kl) >= 2
    assert pruned.split in pruned.split_kl
    assert {shape.num_kv_heads for shape in shapes(shrunk)} == {shapes(dense)[0].num_kv_heads}
    assert pruned.achieved_sparsity == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("name", SINGLE)
def test_without_groups_single_heads_go_as_in_the_paper(name: str) -> None:
    dense, masked, shrunk, pruned = pruned_model(name, sparsity=0.2)
    assert pruned.split == "equal"
    assert pruned.split_kl == {}
    for kept, after in zip(pruned.plan.layers, shapes(shrunk), strict=True):
        assert kept.kept_query_heads == kept.kept_kv_heads
        assert after.num_groups == 1
    counts = [32 - shape.num_heads for shape in shapes(shrunk)]
    assert counts == sorted(counts), "more from later layers"
    assert counts[-1] > 3 * counts[0] > 0
    assert any(count % 4 for count in counts), "not by groups of anything"
    ids_NL = random_ids(dense, 2, 40)
    torch.testing.assert_close(logits(shrunk, ids_NL), logits(masked, ids_NL), atol=1e-4, rtol=1e-4)
