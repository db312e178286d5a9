"""A budget of parameters spent where it costs the least loss: a knapsack over the levels of all sites.

Every site can be cut to some levels, each of which frees parameters and costs loss. Over the lower convex hull of each
site's levels, steps taken by rising loss per parameter are the exact optimum at every total that whole steps meet (the
hull is where a Lagrange multiplier leads; ZipLM, arXiv 2302.04089, solves the same knapsack by dynamic programming over
time). In between, the step that would go too far is taken in part if its site has levels there, and passed over if not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class SiteLevels:
    """What a site can be cut to, from nothing on: parameters that go at each level, rising strictly from 0, and the
    loss that it costs, 0 at first. finer: how many parameters go at once between two levels, whose loss is then
    between theirs in proportion; None if there is nothing between."""

    parameters: tuple[int, ...]
    losses: tuple[float, ...]
    finer: int | None = None

    def loss_at(self, parameters: int) -> float:
        """The loss of removing so many."""
        above = min(bisect_right(self.parameters, parameters), len(self.parameters) - 1)
        if above == 0:
            return 0.0
        (p0, p1), (e0, e1) = (values[above - 1 : above + 1] for values in (self.parameters, self.losses))
        return e0 + (e1 - e0) * (parameters - p0) / (p1 - p0)


def solve_knapsack(sites: Mapping[Name, SiteLevels], wanted: float) -> dict[Name, int]:
    """Parameters to take from each site, `wanted` in all to within half of the smallest step that is left, at the
    least sum of losses. Less than wanted, if not so much can go.
    """
    steps = sorted(
        (
            (slope, order, name, before, after)
            for order, (name, site) in enumerate(sites.items())
            for slope, before, after in _hull(site)
        ),
        key=lambda step: step[:2],  # the slopes of one hull rise, so its steps stay in order
    )
    taken = dict.fromkeys(sites, 0)
    left, passed = wanted, set[Name]()
    for _, _, name, before, after in steps:
        if name in passed:
            continue
        if after - before <= left:
            taken[name] = after
            left -= after - before
            continue
        passed.add(name)  # what comes after this step cannot go without it
        if finer := sites[name].finer:
            count = min(round(left / finer), (after - before) // finer)
            taken[name] = before + count * finer
            left -= count * finer
    _fill_(taken, sites, left)
    return taken


def _fill_(taken: dict[Name, int], sites: Mapping[Name, SiteLevels], left: float) -> None:
    """Take what is left by single levels, the cheapest per parameter first, as long as that comes nearer."""
    while True:
        nearer = []
        for order, (name, site) in enumerate(sites.items()):
            above = bisect_right(site.parameters, taken[name])
            if above < len(site.parameters) and site.parameters[above] - taken[name] < 2 * left:
                before = taken[name], site.loss_at(taken[name])
                nearer.append((_slope(before, (site.parameters[above], site.losses[above])), order, name, above))
        if not nearer:
            return
        _, _, name, above = min(nearer, key=lambda each: each[:2])
        left -= sites[name].parameters[above] - taken[name]
        taken[name] = sites[name].parameters[above]


def _hull(site: SiteLevels) -> list[tuple[float, int, int]]:
    """The steps of the lower convex hull: loss per parameter, parameters before and after; slopes never fall."""
    corners = [(0, 0.0)]
    for point in zip(site.parameters, site.losses, strict=True):
        if point[0] == 0:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], point):
            corners.pop()
        corners.append(point)
    return [(_slope(one, other), one[0], other[0]) for one, other in pairwise(corners)]


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
