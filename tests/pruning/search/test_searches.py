"""Both searches on made-up losses: the budget is kept, no neighbour is better in the end, and seeds decide."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from pruning.allocation.budget import Allocation, LayerBudget
from pruning.allocation.moves import Point, SearchSpace
from pruning.allocation.trace import search_curves
from pruning.families import LayerCost
from pruning.plan import LayerShape
from pruning.search.coordinate import search_by_coordinates
from pruning.search.evolution import search_by_evolution
from pruning.search.judging import Judge, OutOfForwards, Windows

COST = LayerCost(per_query_head=1024, per_kv_head=1024, per_channel=96, fixed=64)
SHAPE = LayerShape(num_heads=8, num_kv_heads=4, intermediate_size=96)
SEARCHES = (search_by_coordinates, search_by_evolution)


def space(layers: int = 3, levels: int = 1) -> SearchSpace:
    budgets = (LayerBudget(1, 32),) * layers
    return SearchSpace(budgets, (SHAPE,) * layers, COST, Allocation(0.3), levels=levels, level_size=0.1)


def random_loss(seed: int, sites: int) -> Callable[[Point], float]:
    """A sum over sites, and over pairs of neighbours, of what their levels cost."""
    rng = random.Random(seed)
    alone = [[rng.random() for _ in range(9)] for _ in range(sites)]
    pairs = [[[0.3 * rng.random() for _ in range(9)] for _ in range(9)] for _ in range(sites)]

    def loss(point: Point) -> float:
        mutual = sum(pairs[site][one][other] for site, (one, other) in enumerate(pairwise(point)))
        return sum(costs[level] for costs, level in zip(alone, point, strict=True)) + mutual

    return loss


def judge_of(searched: SearchSpace, loss: Callable[[Point], float], forwards: int, windows: Windows) -> Judge:
    def measure(number: int, point: Point, *, few: bool) -> float:
        assert searched.balanced(point)
        return loss(point) * (1.1 if few else 1.0)

    def moves(before: Point, after: Point) -> dict[str, int]:
        changes = [new - old for old, new in zip(before, after, strict=True)]
        return {str(site): change for site, change in enumerate(changes) if change}

    start = searched.start
    return Judge(start, loss(start), measure, moves, windows=windows, spent=2, forwards=forwards)


@pytest.mark.parametrize("windows", [Windows(4, 1), Windows(1, None)])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("search", SEARCHES)
def test_with_forwards_enough_no_neighbour_is_better(search: Callable[..., None], seed: int, windows: Windows) -> None:
    searched = space(layers=2)
    loss = random_loss(seed, len(searched.sites))
    judge = judge_of(searched, loss, 10_000, windows)
    search(searched, judge, random.Random(seed))
    assert judge.kl == loss(judge.best) < loss(searched.start)
    assert all(loss(point) >= judge.kl for point in searched.neighbours(judge.best))


@pytest.mark.parametrize("search", SEARCHES)
def test_the_budget_is_kept_and_every_trial_is_told(search: Callable[..., None]) -> None:
    searched = space(layers=6, levels=2)
    loss = random_loss(0, len(searched.sites))
    found = {}
    for forwards in (3, 12, 40):
        judge = judge_of(searched, loss, forwards, Windows(4, 1))
        with pytest.raises(OutOfForwards):
            search(searched, judge, random.Random(0))
        spent = [trial.forwards for trial in judge.trials]
        assert spent == sorted(spent)
        assert forwards - 1 < spent[-1] <= forwards
        assert [trial.number for trial in judge.trials] == list(range(len(judge.trials)))
        accepted = [trial.heldout_kl for trial in judge.trials if trial.accepted]
        assert accepted == sorted(accepted, reverse=True)
        assert accepted[0] == loss(searched.start)
        assert accepted[-1] == judge.kl == loss(judge.best)
        assert all(trial.moves for trial in judge.trials[1:])
        found[forwards] = judge
    assert found[40].kl < found[12].kl < found[3].kl or found[40].kl < found[3].kl
    curves = search_curves(found[40].trials)
    best = [kl for _, kl in curves["search/best_kl_by_forwards"]]
    assert best == sorted(best, reverse=True)
    assert best[-1] == found[40].kl
    again = judge_of(searched, loss, 40, Windows(4, 1))
    with pytest.raises(OutOfForwards):
        search(searched, again, random.Random(0))
    assert again.trials == found[40].trials
    other = judge_of(searched, loss, 40, Windows(4, 1))
    with pytest.raises(OutOfForwards):
        search(searched, other, random.Random(1))
    assert other.trials != again.trials


def test_a_part_of_the_windows_costs_that_part_and_the_dense_model_once_more() -> None:
    searched = space()
    judge = judge_of(searched, random_loss(0, len(searched.sites)), 4, Windows(4, 1))
    one, other, *_ = searched.neighbours(searched.start)
    judge(one, few=True)
    judge(one, few=True)
    judge(other, few=True)
    assert [trial.forwards for trial in judge.trials] == [2, 2.5, 2.75]
    assert judge(one) == judge(one)
    assert not judge.improves(one), "what is known is no better"
    with pytest.raises(OutOfForwards):
        judge(other)
    assert judge.trials[-1].windows == 4
