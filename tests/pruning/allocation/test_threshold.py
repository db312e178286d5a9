"""One threshold: what scores least goes, sites are nested, and the sparsity is met by parameters."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pruning.allocation.budget import Allocation, removed_parameters
from pruning.allocation.threshold import LayerScores, Measure, threshold_budgets
from pruning.errors import PruningError
from pruning.families import LayerCost
from pruning.plan import LayerShape

SHAPE = LayerShape(num_heads=8, num_kv_heads=4, intermediate_size=64)
SHAPES = (SHAPE,) * 5
COST = LayerCost(per_query_head=512, per_kv_head=512, per_channel=96, fixed=64)
TOTAL = 5 * COST.parameters(SHAPE)


def random_scores(unit: str, seed: int = 0) -> list[LayerScores]:
    rng = random.Random(seed)
    heads = 4 if unit == "kv_group" else 8
    return [
        LayerScores(tuple(sorted(rng.random() for _ in range(heads))), tuple(sorted(rng.random() for _ in range(64))))
        for _ in SHAPES
    ]


def budgets(measure: Measure, scores: list[LayerScores], *, joint: bool = True, **allocation: Any) -> Any:
    return threshold_budgets(scores, SHAPES, COST, Allocation(**allocation), measure, joint=joint)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("measure", ["score", "per_parameter", "standardised"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_the_sparsity_is_met_to_half_a_group(sparsity: float, unit: Any, measure: Measure, joint: bool) -> None:
    found = budgets(measure, random_scores(unit), joint=joint, sparsity=sparsity, head_unit=unit)
    unit_parameters = 512 + 2 * 512 if unit == "kv_group" else 4 * 512
    removed = removed_parameters(found, SHAPES, COST, unit)
    assert abs(removed - sparsity * TOTAL) <= unit_parameters / 2


def test_what_goes_scores_less_per_parameter_than_what_stays() -> None:
    scores = random_scores("kv_group")
    found = budgets("per_parameter", scores, sparsity=0.4)
    per_group = 512 + 2 * 512
    gone = [s / per_group for b, of in zip(found, scores, strict=True) for s in of.attention[: b.head_units]]
    gone += [s / 96 for b, of in zip(found, scores, strict=True) for s in of.mlp[: b.channels]]
    left = [s / per_group for b, of in zip(found, scores, strict=True) for s in of.attention[b.head_units : 3]]
    left += [s / 96 for b, of in zip(found, scores, strict=True) for s in of.mlp[b.channels : 60]]
    assert max(gone) <= min(left)


def test_standardising_makes_layers_comparable() -> None:
    scores = random_scores("kv_group")
    louder = [
        LayerScores(tuple(10**i * s + i for s in of.attention), tuple(10**i * s + i for s in of.mlp))
        for i, of in enumerate(scores)
    ]
    assert budgets("standardised", scores, sparsity=0.3) == budgets("standardised", louder, sparsity=0.3)
    assert budgets("score", scores, sparsity=0.3) != budgets("score", louder, sparsity=0.3)


def test_protected_layers_and_the_last_unit_stay() -> None:
    found = budgets("score", random_scores("kv_group"), sparsity=0.5, protect_first=1, protect_last=1)
    assert (found[0].head_units, found[0].channels, found[4].head_units, found[4].channels) == (0, 0, 0, 0)
    assert all(budget.head_units <= 3 and budget.channels <= 60 for budget in found)
    cheap_heads = [LayerScores((0.0,) * 4, (1.0,) * 64) for _ in SHAPES]
    assert {budget.head_units for budget in budgets("score", cheap_heads, sparsity=0.6)} == {3}


def test_an_order_is_nested_even_where_its_scores_fall() -> None:
    # the second channel is cheap, but it can only go after the first
    scores = [LayerScores((9.0,) * 4, (5.0, 0.0, *(6.0,) * 62)), *(LayerScores((9.0,) * 4, (1.0,) * 64),) * 4]
    found = budgets("score", scores, sparsity=0.1)
    assert found[0].channels == 0


def test_separate_thresholds_share_by_the_split() -> None:
    for ratio, heads in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        found = budgets("score", random_scores("kv_group"), joint=False, sparsity=0.3, attention_ratio=ratio)
        of_heads = sum(budget.head_units for budget in found) / (5 * 3)
        of_channels = sum(budget.channels for budget in found) / (5 * 60)
        assert of_heads == pytest.approx(heads * of_channels, abs=0.06)


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(PruningError, match=r"sparsity 0\.9 cannot be reached: .* at most 0\.\d+ of the decoder-layer"):
        budgets("score", random_scores("kv_group"), sparsity=0.9, protect_first=1)
