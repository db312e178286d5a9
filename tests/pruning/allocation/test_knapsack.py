"""The knapsack over levels: against enumeration, nested along each site, and the budget met."""

from __future__ import annotations

import random
from itertools import product

import pytest

from pruning.allocation.knapsack import SiteLevels, solve_knapsack


def site(rng: random.Random, levels: int, *, convex: bool, finer: int | None = None) -> SiteLevels:
    """Random steps of 4 to 12 parameters; losses per parameter rise if convex."""
    widths = [4 * rng.randint(1, 3) for _ in range(levels)]
    slopes = [rng.random() for _ in range(levels)]
    parameters, losses = [0], [0.0]
    for width, slope in zip(widths, sorted(slopes) if convex else slopes, strict=True):
        parameters.append(parameters[-1] + width)
        losses.append(losses[-1] + width * slope)
    return SiteLevels(tuple(parameters), tuple(losses), finer)


def total(sites: dict[str, SiteLevels], taken: dict[str, int]) -> float:
    return sum(sites[name].loss_at(parameters) for name, parameters in taken.items())


def cheapest(sites: dict[str, SiteLevels], wanted: int) -> float:
    """Of all combinations of levels that free so many parameters or more."""
    combinations = product(*(zip(each.parameters, each.losses, strict=True) for each in sites.values()))
    return min(sum(loss for _, loss in levels) for levels in combinations if sum(p for p, _ in levels) >= wanted)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_combination_of_levels_is_cheaper(seed: int, convex: bool) -> None:
    rng = random.Random(seed)
    sites = {name: site(rng, 5, convex=convex) for name in "abc"}
    most = sum(each.parameters[-1] for each in sites.values())
    exact = 0
    for wanted in range(4, most + 1, 4):
        taken = solve_knapsack(sites, wanted)
        assert all(taken[name] in each.parameters for name, each in sites.items())
        if sum(taken.values()) == wanted and total(sites, taken) == pytest.approx(cheapest(sites, wanted)):
            exact += 1
        # a hull is left by one step at most, which costs no more than the dearest that was taken
        dearest = max(each.losses[-1] for each in sites.values())
        assert total(sites, taken) <= cheapest(sites, wanted) + dearest
    assert exact >= 3  # the corners of the hull at least
    assert solve_knapsack(sites, most) == {name: each.parameters[-1] for name, each in sites.items()}


@pytest.mark.parametrize("seed", range(2))
def test_single_channels_meet_the_budget_exactly(seed: int) -> None:
    """With levels as fine as parameters on convex curves greedy is optimal at every budget."""
    rng = random.Random(seed)
    sites = {name: site(rng, 2, convex=True, finer=1) for name in "abc"}
    fine = {
        name: SiteLevels(
            tuple(range(each.parameters[-1] + 1)), tuple(map(each.loss_at, range(each.parameters[-1] + 1)))
        )
        for name, each in sites.items()
    }
    for wanted in (3, 17):
        taken = solve_knapsack(sites, wanted)
        assert sum(taken.values()) == wanted
        assert total(sites, taken) == pytest.approx(cheapest(fine, wanted))


def test_a_whole_site_goes_at_once_where_that_is_cheapest() -> None:
    """Its first levels are dear, the last is not: the hull leads past them."""
    sites = {"whole": SiteLevels((0, 10, 20), (0.0, 9.0, 10.0)), "flat": SiteLevels((0, 10, 20), (0.0, 6.0, 12.0))}
    assert solve_knapsack(sites, 20) == {"whole": 20, "flat": 0}
    assert solve_knapsack(sites, 10) == {"whole": 0, "flat": 10}  # which is cheaper than a part of the other
    assert solve_knapsack(sites, 39) == {"whole": 20, "flat": 20}  # the nearer of 30 and 40


def test_what_no_level_reaches_is_left() -> None:
    sites = {"a": SiteLevels((0, 10), (0.0, 1.0)), "b": SiteLevels((0,), (0.0,))}
    assert solve_knapsack(sites, 4) == {"a": 0, "b": 0}
    assert solve_knapsack(sites, 6) == {"a": 10, "b": 0}
    assert solve_knapsack(sites, 100) == {"a": 10, "b": 0}
    assert solve_knapsack(sites, -5) == {"a": 0, "b": 0}
