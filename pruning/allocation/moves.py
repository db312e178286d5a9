"""Moves between sites that leave the size as it is: what a search over levels goes through. Integers, no tensors.

Every site that may be cut has a few levels around the one at which the search starts. A level is about a share of an
FFN's channels; where there are heads it is as many parameters as whole head units have, so that heads and channels can
be exchanged. A point is the level of every site; a move switches levels as in EvoPress (arXiv 2410.14649, section 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pruning.allocation.budget import (
    Allocation,
    LayerBudget,
    num_head_units,
    parameters_left,
    unit_parameters,
)
from pruning.allocation.grid import TOLERANCE
from pruning.families import LayerCost
from pruning.plan import LayerShape

if TYPE_CHECKING:
    from pruning.families.forward import SubLayerKind

Point = tuple[int, ...]
"""The level of each site, an index into its counts."""


@dataclass(frozen=True)
class MovableSite:
    """One sub-layer. counts: head units or channels that are gone at each of its levels, rising."""

    layer: int
    kind: SubLayerKind
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SearchSpace:
    """All points around the budgets at which a search starts.

    budgets, shapes: of all layers, without experts. allocation: its protected layers, head unit, channel_multiple and
    sparsity (for the tolerance). levels: how many a site has on either side of its start at most. level_size: share of
    the channels of the widest FFN that one level is about. The first layer's attention keeps one head unit, where the
    length of a KV cache is read; everything else may go as a whole.
    """

    budgets: tuple[LayerBudget, ...]
    shapes: tuple[LayerShape, ...]
    cost: LayerCost
    allocation: Allocation
    levels: int
    level_size: float

    @cached_property
    def sites(self) -> tuple[MovableSite, ...]:
        """The sub-layers that may be cut, layer by layer, also those of one level."""
        return tuple(self._sites())

    @cached_property
    def start(self) -> Point:
        """Where every site has lost what its layer's budget says."""
        return tuple(site.counts.index(self._gone(site.kind, self.budgets[site.layer])) for site in self.sites)

    @cached_property
    def step(self) -> LayerBudget:
        """Head units and channels of one level."""
        widest = max(shape.intermediate_size for shape in self.shapes)
        heads = max(self.shapes, key=lambda shape: num_head_units(shape, self.allocation.head_unit))
        per_unit, multiple = (
            unit_parameters(heads, self.cost, self.allocation.head_unit),
            self.allocation.channel_multiple,
        )
        units, channels = 1, self.level_size * widest
        if per_unit and heads.num_heads:
            units = max(1, round(channels * self.cost.per_channel / per_unit))
            channels = units * per_unit / self.cost.per_channel
        return LayerBudget(units, multiple * max(1, round(channels / multiple)))

    def budgets_at(self, point: Point) -> tuple[LayerBudget, ...]:
        """What goes from each layer."""
        budgets = list(self.budgets)
        for site, level in zip(self.sites, point, strict=True):
            gone, count = budgets[site.layer], site.counts[level]
            heads = site.kind == "attention"
            budgets[site.layer] = LayerBudget(*((count, gone.channels) if heads else (gone.head_units, count)))
        return tuple(budgets)

    def left(self, point: Point) -> int:
        """Decoder-layer parameters that stay."""
        return sum(map(self._left_of, range(len(self.shapes)), self.budgets_at(point)))

    def balanced(self, point: Point) -> bool:
        """Whether as many parameters stay as at the start: to half a channel (or half of their multiple) for each head
        unit that has moved, never off by more than a quarter of a level or the tolerance of widths on a grid."""
        moved = sum(
            abs(site.counts[level] - site.counts[start])
            for site, level, start in zip(self.sites, point, self.start, strict=True)
            if site.kind == "attention"
        )
        off = abs(self.left(point) - self._wanted)
        per_channel, multiple = self.cost.per_channel, self.allocation.channel_multiple
        slack = min(0.5 * multiple * (1 + moved), 0.25 * max(self.step.channels, 2)) * per_channel
        return off <= min(slack, TOLERANCE * self._total)

    def transfer(self, point: Point, takers: Iterable[int], givers: Iterable[int], *, first: bool = False) -> Point:
        """Let takers lose one level more, in turn, and givers get one back to make up for it, until either have all
        had their turn; the last balanced point on the way, or the first one. Sites may be named several times."""
        best, now = point, list(point)
        losing, gaining = deque(takers), deque(givers)
        while True:
            too_much = self.left(tuple(now)) < self._wanted
            if not self._turn(now, gaining if too_much else losing, -1 if too_much else 1):
                return best
            if self.balanced(tuple(now)):
                best = tuple(now)
                if first:
                    return best

    def pair(self, point: Point, taker: int, giver: int) -> Point | None:
        """The nearest balanced point at which one site has lost more and one less; None if there is none."""
        moved = self.transfer(point, [taker] * 2, [giver] * 2, first=True)
        return None if moved == point else moved

    def neighbours(self, point: Point) -> Iterator[Point]:
        """All points that one pair of sites leads to."""
        for taker in range(len(self.sites)):
            for giver in range(len(self.sites)):
                moved = self.pair(point, taker, giver) if taker != giver else None
                if moved is not None:
                    yield moved

    def _sites(self) -> Iterator[MovableSite]:
        allocation = self.allocation
        for layer in range(allocation.protect_first, len(self.shapes) - allocation.protect_last):
            shape, budget = self.shapes[layer], self.budgets[layer]
            if shape.num_heads:
                most = num_head_units(shape, allocation.head_unit) - (layer == 0)
                yield MovableSite(layer, "attention", self._counts(budget.head_units, self.step.head_units, 0, most))
            if width := shape.intermediate_size:
                least = min(width % allocation.channel_multiple, budget.channels)
                yield MovableSite(layer, "mlp", self._counts(budget.channels, self.step.channels, least, width))

    def _counts(self, start: int, step: int, least: int, most: int) -> tuple[int, ...]:
        """Whole levels, and less of one where a site has nothing more to give or to get back."""
        around = (start + step * level for level in range(-self.levels, self.levels + 1))
        return tuple(sorted({min(max(count, least), most) for count in around}))

    def _gone(self, kind: SubLayerKind, budget: LayerBudget) -> int:
        return budget.head_units if kind == "attention" else budget.channels

    def _turn(self, now: list[int], queue: deque[int], step: int) -> bool:
        """Move the next site of the queue that has another level on that side."""
        while queue:
            site = queue.popleft()
            if 0 <= now[site] + step < len(self.sites[site].counts):
                now[site] += step
                return True
        return False

    def _left_of(self, layer: int, budget: LayerBudget) -> int:
        known = self._counted
        if (layer, budget) not in known:
            unit = self.allocation.head_unit
            known[layer, budget] = parameters_left((budget,), (self.shapes[layer],), self.cost, unit)
        return known[layer, budget]

    @cached_property
    def _counted(self) -> dict[tuple[int, LayerBudget], int]:
        return {}

    @cached_property
    def _wanted(self) -> int:
        return self.left(self.start)

    @cached_property
    def _total(self) -> int:
        return sum(map(self.cost.parameters, self.shapes))


def of_kind(sites: Sequence[MovableSite], kind: SubLayerKind) -> list[int]:
    """Indices of the sites of one kind."""
    return [index for index, site in enumerate(sites) if site.kind == kind]
