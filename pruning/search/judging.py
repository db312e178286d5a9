"""Candidates judged, counted and remembered: each once, within a budget of forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pruning.allocation.moves import Point
from pruning.allocation.trace import SearchTrial


class OutOfForwards(Exception):
    """The next candidate would cost more than what is left."""


class Measure(Protocol):
    """Whoever can tell the KL of a point."""

    def __call__(self, number: int, point: Point, *, few: bool) -> float:
        """Mean KL to the dense logits in nats per token, of the trial of that number. few: on a part of the windows."""


@dataclass(frozen=True)
class Windows:
    """Held-out windows: all, and the part that gives a first impression, None if they are too few for that."""

    all: int
    few: int | None


class Judge:
    """The best point so far, and the KL of candidates as long as the budget lasts.

    start, start_kl: where the search begins. measure: see Measure. moves: what a point removes more than another, by
    linear. windows: that judge. spent: forwards that went before. forwards: that may be spent in all.
    """

    def __init__(
        self,
        start: Point,
        start_kl: float,
        measure: Measure,
        moves: Callable[[Point, Point], dict[str, int]],
        *,
        windows: Windows,
        spent: int,
        forwards: int,
    ) -> None:
        self.best, self.kl = start, start_kl
        self.windows = windows
        self._measure, self._moves = measure, moves
        self._spent, self._budget = spent * windows.all, forwards * windows.all  # in windows, exactly
        self._impressed = False
        self._known: dict[tuple[Point, bool], float] = {(start, False): start_kl}
        self.trials = [
            SearchTrial(number=0, kind="start", forwards=spent, windows=windows.all, heldout_kl=start_kl, accepted=True)
        ]

    def __call__(self, point: Point, *, few: bool = False) -> float:
        """The KL of a candidate. few: on the part of the windows. Raises OutOfForwards."""
        if (point, few) in self._known:
            return self._known[point, few]
        part = (self.windows.few or self.windows.all) if few else self.windows.all
        cost = part if self._impressed or not few else 2 * part  # the dense model looks at the part once
        if self._spent + cost > self._budget:
            raise OutOfForwards
        number = len(self.trials)
        kl = self._known[point, few] = self._measure(number, point, few=few)
        self._spent += cost
        self._impressed |= few
        self.trials.append(
            SearchTrial(
                number=number,
                kind="candidate",
                forwards=self._spent / self.windows.all,
                windows=part,
                heldout_kl=kl,
                accepted=False,
                moves=self._moves(self.best, point),
            )
        )
        return kl

    def knows(self, point: Point, *, few: bool = False) -> bool:
        """Whether it was judged: then it is no better than the best one, which only gets better."""
        return (point, few) in self._known

    def improves(self, point: Point) -> bool:
        """Judge a candidate by all windows and let it be the best one if its KL is lower. Raises OutOfForwards."""
        if self.knows(point):
            return False
        kl = self(point)
        if kl >= self.kl:
            return False
        self.best, self.kl = point, kl
        self.trials[-1] = self.trials[-1].model_copy(update={"accepted": True})
        return True
