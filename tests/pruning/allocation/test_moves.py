"""Moves between sites: the size stays, levels are kept to, and nothing that must stay goes."""

from __future__ import annotations

import random

import pytest

from pruning.allocation.budget import Allocation, LayerBudget, parameters_left
from pruning.allocation.moves import SearchSpace, of_kind
from pruning.families import LayerCost, decoder_parameters, layer_cost, shapes
from pruning.plan import LayerPlan, LayerShape
from tests.tiny import tiny_model

COST = LayerCost(per_query_head=1024, per_kv_head=1024, per_channel=96, fixed=64)
SHAPE = LayerShape(num_heads=8, num_kv_heads=4, intermediate_size=96)


def space(*budgets: tuple[int, int], levels: int = 2, **allocation: object) -> SearchSpace:
    asked = Allocation(**({"sparsity": 0.3, "head_unit": "kv_group"} | allocation))  # type: ignore[arg-type]
    given = tuple(LayerBudget(*budget) for budget in budgets)
    return SearchSpace(given, (SHAPE,) * len(given), COST, asked, levels=levels, level_size=0.1)


def test_a_level_is_worth_whole_head_units() -> None:
    assert space((1, 30)).step == LayerBudget(1, 32)  # a kv group: 3 x 1024 / 96 channels
    assert space((1, 32), channel_multiple=64).step == LayerBudget(1, 64)
    assert space((0, 30), head_unit="query_head").step == LayerBudget(1, 43)
    sites = space((1, 32), (0, 64), (4, 96)).sites
    assert [site.counts for site in sites] == [
        (0, 1, 2, 3),
        (0, 32, 64, 96),
        (0, 1, 2),
        (0, 32, 64, 96),
        (2, 3, 4),
        (32, 64, 96),
    ]
    assert of_kind(sites, "mlp") == [1, 3, 5]
    assert [site.layer for site in space((1, 32), (0, 64), (1, 64), protect_first=1, protect_last=1).sites] == [1, 1]


@pytest.mark.parametrize("head_unit", ["kv_group", "query_head"])
def test_whatever_is_drawn_the_size_stays(head_unit: str) -> None:
    searched = space((1, 30), (0, 50), (2, 60), levels=3, head_unit=head_unit)
    rng, point = random.Random(0), searched.start
    wanted, moved = searched.left(point), 0
    for _ in range(200):
        sites = rng.sample(range(len(searched.sites)), len(searched.sites))
        cut = rng.randint(1, len(sites) - 1)
        after = searched.transfer(point, sites[:cut], sites[cut:])
        moved += after != point
        point = after
        assert searched.balanced(point)
        heads = sum(
            abs(a.head_units - b.head_units) for a, b in zip(searched.budgets_at(point), searched.budgets, strict=True)
        )
        assert abs(searched.left(point) - wanted) <= 48 * (1 + heads)
        assert searched.budgets_at(point)[0].head_units < 4, "of the first layer's attention one unit stays"
    assert moved > 20


def test_neighbours_are_all_balanced_pairs() -> None:
    searched = space((1, 32), (1, 32), levels=1)
    found = set(searched.neighbours(searched.start))
    assert all(searched.balanced(point) and point != searched.start for point in found)
    assert len(found) == 12  # every site takes from every other one
    assert all(sorted(after - 1 for after in point) == [-1, 0, 0, 1] for point in found)
    assert all(searched.left(point) == searched.left(searched.start) for point in found)


def test_the_last_query_heads_take_their_kv_heads_along_and_two_levels_make_up_for_it() -> None:
    searched = space((0, 43), (1, 86), head_unit="query_head")
    attention, channels = 2, 3
    assert searched.sites[attention].counts == (0, 1, 2)
    assert searched.sites[channels].counts == (0, 43, 86, 96), "with less than a level where there is no more"
    assert searched.start == (0, 1, 1, 2)
    assert searched.pair(searched.start, attention, channels) == (0, 1, 2, 0)
    assert searched.pair(searched.start, attention, 1) is None, "of the first layer only one level can come back"
    start = parameters_left([LayerBudget(0, 0)] * 2, searched.shapes, COST, "query_head")
    gone = parameters_left([LayerBudget(0, 0), LayerBudget(2, 0)], searched.shapes, COST, "query_head")
    assert start - gone == 8 * 1024 + 4 * 1024


@pytest.mark.parametrize("name", ["llama", "opt", "olmo2"])
def test_what_is_left_is_what_a_model_has(name: str) -> None:
    model = tiny_model(name)
    widths, cost = shapes(model), layer_cost(model)
    nothing = [LayerBudget(0, 0)] * len(widths)
    assert parameters_left(nothing, widths, cost, "kv_group") == decoder_parameters(model)
    budgets = [*nothing[:-1], LayerBudget(widths[-1].num_kv_heads, widths[-1].intermediate_size)]
    assert parameters_left(budgets, widths, cost, "kv_group") == decoder_parameters(model) - cost.parameters(widths[-1])
    plan = LayerPlan.full(0, widths[0])
    assert (
        parameters_left([LayerBudget(0, 5)], widths[:1], cost, "kv_group")
        == cost.parameters(plan.shape) - 5 * cost.per_channel
    )
