"""An evolutionary search: the best point so far has offspring, of which the best takes its place if it is better.

EvoPress (arXiv 2410.14649, section 3): one parent, mutations that switch levels between pairs of sites, and selection
in stages, of which the first ones look at less text. Its generations are larger: there the budget is hours.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruning.allocation.moves import Point, SearchSpace
    from pruning.search.judging import Judge

#: offspring of a generation that a part of the windows judges, and how many of them all windows judge
_OFFSPRING, _SURVIVORS = 8, 2
#: pairs that one mutation switches: the smaller of two draws up to this
_MOST_SWITCHES = 3
#: mutations that are drawn for a generation before the surroundings count as used up
_DRAWS = 200


def search_by_evolution(space: SearchSpace, judge: Judge, rng: random.Random) -> None:
    """Improve the judge's best point until nothing new is drawn. Raises OutOfForwards when that comes first."""
    staged = judge.windows.few is not None
    while children := _children(space, judge, rng, _OFFSPRING if staged else _SURVIVORS):
        if staged:
            children = sorted(children, key=lambda child: judge(child, few=True))[:_SURVIVORS]
        for child in children:
            judge.improves(child)


def _children(space: SearchSpace, judge: Judge, rng: random.Random, wanted: int) -> list[Point]:
    """As many mutations of the best point as wanted, or as are found, all different and never judged by all windows."""
    children: dict[Point, None] = {}
    for _ in range(_DRAWS):
        child = _mutated(space, judge.best, rng)
        if child != judge.best and not judge.knows(child):
            children[child] = None
        if len(children) == wanted:
            break
    return list(children)


def _mutated(space: SearchSpace, point: Point, rng: random.Random) -> Point:
    if len(space.sites) < 2:
        return point
    for _ in range(min(rng.randint(1, _MOST_SWITCHES), rng.randint(1, _MOST_SWITCHES))):
        taker, giver = rng.sample(range(len(space.sites)), 2)
        point = space.pair(point, taker, giver) or point
    return point
