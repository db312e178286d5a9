"""Coordinate moves: parameters are moved along a few directions, then between ever fewer sites, as long as that helps.

The first directions are between attention and FFN, and between the earlier and the later part of ever smaller spans of
layers: what a rule that looks at one site at a time gets wrong, it mostly gets wrong for many at once. What these
trials say about the sites that they moved orders the later ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

from pruning.allocation.moves import Point, of_kind

if TYPE_CHECKING:
    from pruning.allocation.moves import MovableSite, SearchSpace
    from pruning.search.judging import Judge

#: depth is halved so often: between halves, and between the quarters of each half
_HALVINGS = 2


def search_by_coordinates(space: SearchSpace, judge: Judge, rng: random.Random) -> None:
    """Improve the judge's best point until no pair of sites does any more. Raises OutOfForwards when that comes first.

    rng: in which order sites are taken of which nothing is known.
    """
    order = list(range(len(space.sites)))
    rng.shuffle(order)
    slopes = _Slopes(space, judge, order)
    for directions in _directions(space.sites):
        for takers, givers in permutations(directions):
            while slopes.try_(space.transfer(judge.best, slopes.cheapest(takers), slopes.dearest(givers))):
                pass  # the same way, as long as it helps
    at_once = len(order) // 4
    while at_once > 1:
        takers = slopes.cheapest(order)[:at_once]
        givers = [site for site in slopes.dearest(order) if site not in takers]
        if not slopes.try_(space.transfer(judge.best, takers, givers)):
            at_once //= 2
    while any(slopes.try_(point) for point in slopes.pairs()):
        pass  # around the new point, from the most promising pair on


def _directions(sites: Sequence[MovableSite]) -> Iterator[tuple[list[int], list[int]]]:
    """Two sides each, between which parameters are moved."""
    yield of_kind(sites, "attention"), of_kind(sites, "mlp")
    spans = [list(range(len(sites)))]
    for _ in range(_HALVINGS):
        halves = [(span[: len(span) // 2], span[len(span) // 2 :]) for span in spans]
        yield from halves
        spans = [half for both in halves for half in both]


class _Slopes:
    """How much the KL rose with the level of each site, as the trials so far say: what a trial has cost is shared by
    all sites that it moved, and averaged over trials."""

    def __init__(self, space: SearchSpace, judge: Judge, order: Sequence[int]) -> None:
        self._space, self._judge = space, judge
        self._place = {site: place for place, site in enumerate(order)}
        self._sums, self._counts = [0.0] * len(order), [0] * len(order)

    def try_(self, point: Point) -> bool:
        """Whether a point improves on the best one; what is known already does not. Raises OutOfForwards."""
        before, kl = self._judge.best, self._judge.kl
        if self._judge.knows(point):
            return False
        improves = self._judge.improves(point)
        changes = [after - level for level, after in zip(before, point, strict=True)]
        for site, change in enumerate(changes):
            if change:
                self._sums[site] += (self._judge(point) - kl) / sum(map(abs, changes)) * (1 if change > 0 else -1)
                self._counts[site] += 1
        return improves

    def cheapest(self, sites: Sequence[int]) -> list[int]:
        """By rising slope: the first ones are to lose more."""
        return sorted(sites, key=lambda site: (self._slope(site), self._place[site]))

    def dearest(self, sites: Sequence[int]) -> list[int]:
        """By falling slope: the first ones are to get something back."""
        return sorted(sites, key=lambda site: (-self._slope(site), self._place[site]))

    def pairs(self) -> Iterator[Point]:
        """What single pairs lead to from the best point, the most promising first, as far as is known after each."""
        left = set(permutations(range(len(self._place)), 2))
        while left:
            for pair in sorted(left, key=self._promise):
                left.remove(pair)
                point = self._space.pair(self._judge.best, *pair)
                if point is not None and not self._judge.knows(point):
                    yield point
                    break  # more is known now

    def _promise(self, pair: tuple[int, int]) -> tuple[float, int, int]:
        taker, giver = pair
        return self._slope(taker) - self._slope(giver), self._place[taker], self._place[giver]

    def _slope(self, site: int) -> float:
        return self._sums[site] / max(1, self._counts[site])
