"""Widths on a grid: multiples with the sparsity met all the same, and layers that are equal."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from infra.registry import available, load
from pruning.allocation.budget import Allocation, LayerBudget, removed_parameters
from pruning.allocation.grid import TOLERANCE
from pruning.allocation.schedule import check_grid, solve_budgets
from pruning.allocation.threshold import LayerScores, threshold_budgets
from pruning.errors import PruningError
from pruning.families import FAMILIES, LayerCost
from pruning.plan import LayerShape
from tests.pruning.allocation.test_schedule import CURVES, MODELS

SMALL = LayerShape(num_heads=8, num_kv_heads=4, intermediate_size=48)
COST = LayerCost(2 * 4 * 32, 2 * 4 * 32, 3 * 32, 64)


def share(budgets: tuple[LayerBudget, ...], name: str, unit: Any = "kv_group") -> float:
    source, cost = MODELS[name]
    return removed_parameters(budgets, source, cost, unit) / sum(map(cost.parameters, source))


@pytest.mark.parametrize("multiple", [64, 128])
@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3-8B", "Qwen3-0.6B"])
def test_multiples_meet_the_sparsity_along_every_curve(name: str, multiple: int) -> None:
    source, cost = MODELS[name]
    for curve in CURVES:
        for sparsity, ratio in ((0.2, 1.0), (0.5, 0.0), (0.33, 1 / 3)):
            allocation = Allocation(sparsity, curve, attention_ratio=ratio, channel_multiple=multiple)
            budgets = solve_budgets(source, cost, allocation)
            widths = [shape.intermediate_size - b.channels for shape, b in zip(source, budgets, strict=True)]
            assert all(width % multiple == 0 and width > 0 for width in widths), widths
            assert abs(share(budgets, name) - sparsity) <= TOLERANCE
            free = solve_budgets(source, cost, Allocation(sparsity, curve, attention_ratio=ratio))
            distances = [abs(a.channels - b.channels) for a, b in zip(budgets, free, strict=True)]
            assert max(distances) <= 2 * multiple, distances


def test_protected_layers_stay_whole_and_odd_widths_become_multiples() -> None:
    source = (SMALL.model_copy(update={"intermediate_size": 50}),) * 6
    allocation = Allocation(0.3, "uniform", protect_first=1, protect_last=1, channel_multiple=4)
    budgets = solve_budgets(source, COST, allocation)
    assert budgets[0] == budgets[-1] == LayerBudget(0, 0)
    assert {(50 - budget.channels) % 4 for budget in budgets[1:-1]} == {0}


@pytest.mark.parametrize("joint", [True, False])
def test_one_threshold_takes_multiples_too(joint: bool) -> None:
    scores = [LayerScores(tuple(range(4)), tuple((layer + 1) * c for c in range(48))) for layer in range(6)]
    allocation = Allocation(0.3, channel_multiple=4)
    budgets = threshold_budgets(scores, (SMALL,) * 6, COST, allocation, "per_parameter", joint=joint)
    assert all((48 - budget.channels) % 4 == 0 for budget in budgets)
    assert len({budget.channels for budget in budgets}) > 1
    free = threshold_budgets(scores, (SMALL,) * 6, COST, Allocation(0.3), "per_parameter", joint=joint)
    assert [budget.head_units for budget in budgets] == [budget.head_units for budget in free]
    assert abs(sum(budget.channels for budget in budgets) - sum(budget.channels for budget in free)) <= 2


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("multiple", [1, 64])
def test_equal_layers_meet_the_sparsity(unit: Any, multiple: int) -> None:
    for name in ("Llama-3-8B", "Qwen3-8B"):
        source, cost = MODELS[name]
        for sparsity in (0.2, 0.25, 0.5):
            allocation = Allocation(sparsity, head_unit=unit, uniform=True, channel_multiple=multiple)
            budgets = solve_budgets(source, cost, allocation)
            assert len(set(budgets)) == 1
            assert (source[0].intermediate_size - budgets[0].channels) % multiple == 0
            assert budgets[0].head_units > 0
            assert abs(share(budgets, name, unit) - sparsity) <= TOLERANCE


def test_only_numbers_of_heads_that_the_stock_class_builds() -> None:
    source, cost = MODELS["LLaMA-7B"]
    stock = LayerCost(
        cost.per_query_head, cost.per_kv_head, cost.per_channel, cost.fixed, stock_heads=(1, 2, 4, 8, 16, 32)
    )
    for sparsity, heads in ((0.2, 32), (0.5, 16)):
        (budget,) = set(solve_budgets(source, stock, Allocation(sparsity, uniform=True)))
        assert 32 - budget.head_units == heads
    llama = next(family for family in FAMILIES if family.name == "llama")
    assert (llama.stock_heads(576, 64) or ())[:7] == (1, 2, 3, 4, 6, 8, 9)
    assert next(family for family in FAMILIES if family.name == "qwen2").stock_heads(576, 64) is None


@pytest.mark.parametrize(
    "changes, shapes, sentence",
    [
        ({"channel_multiple": 64}, (SMALL,) * 3, "more than the narrowest FFN has channels (48)"),
        ({"channel_multiple": 16}, (SMALL,) * 2, "cannot be met with channel_multiple 16: the nearest is 0."),
        ({"uniform": True, "channel_multiple": 16}, (SMALL,) * 3, "cannot be met with equal layers: the nearest"),
        ({"uniform": True, "protect_last": 1}, (SMALL,) * 3, "leave protect_first and protect_last out"),
        ({"uniform": True, "end_points": (0.2, 0.2)}, (SMALL,) * 3, "which uniform would round"),
        (
            {"uniform": True},
            (SMALL, SMALL.model_copy(update={"intermediate_size": 40})),
            "1 layer of 8/4 heads x 48, 1 layer of 8/4 heads x 40",
        ),
        ({"channel_multiple": 5, "attention_ratio": math.inf}, (SMALL,) * 3, "split attention leaves the FFN as it is"),
    ],
)
def test_what_is_on_no_grid_is_refused(changes: dict[str, Any], shapes: tuple[LayerShape, ...], sentence: str) -> None:
    with pytest.raises(PruningError) as refused:
        check_grid(Allocation(0.23, "uniform", **changes), shapes, COST, threshold=False)
    assert sentence in str(refused.value)


#: of those whose defaults leave layers whole, or take what scores least wherever it stands
EQUAL: dict[str, dict[str, Any]] = {
    "flap": {"structure": "UL-UM", "repair": "none"},
    "llm_pruner": {"protect_first": 0, "protect_last": 0},
}
BY_THRESHOLD: dict[str, dict[str, Any]] = {"flap": {"structure": "AL-AM"}, "compresso": {}}


WIDTH_METHODS = [
    name
    for name in available("pruning.methods")
    if "uniform" in load("pruning.methods", name, "method").Config.model_fields
]


@pytest.mark.parametrize("name", WIDTH_METHODS)
def test_every_method_that_cuts_widths_offers_both(name: str) -> None:
    """As options that are in no key where they are not asked for, and refused where they cannot be had."""
    module = load("pruning.methods", name, "method")
    plain = module.Config.model_validate({"sparsity": 0.25} | EQUAL.get(name, {}))
    assert not {"uniform", "channel_multiple"} & plain.model_dump(mode="json").keys()
    asked = module.Config.model_validate(
        {"sparsity": 0.25} | EQUAL.get(name, {}) | {"uniform": True, "channel_multiple": 2}
    )
    assert asked.model_dump(mode="json")["uniform"] is True
    shapes = (SMALL,) * 4
    if name != "compresso":
        module.check_model(asked, shapes, COST, FAMILIES[0])
    with pytest.raises(PruningError, match="narrowest FFN"):
        module.check_model(
            asked.model_copy(update={"channel_multiple": 64, "uniform": False}), shapes, COST, FAMILIES[0]
        )
    by_threshold = BY_THRESHOLD.get(name, {"allocation": "global"})
    try:
        threshold = module.Config.model_validate(
            {"sparsity": 0.25} | EQUAL.get(name, {}) | by_threshold | {"uniform": True}
        )
    except ValidationError:
        return  # it has no threshold
    with pytest.raises(PruningError, match="one threshold for all layers does not"):
        module.check_model(threshold, shapes, COST, FAMILIES[0])


def test_all_methods_but_those_of_layers_experts_and_tokens_cut_widths() -> None:
    assert set(available("pruning.methods")) - set(WIDTH_METHODS) == {"experts", "shortened", "vocabulary"}
