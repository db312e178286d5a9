"""Is a figure better or worse than the one before it, or is the difference noise?

The test: two figures with standard errors are compared by a two-sided z test of their difference, the errors taken as
independent. Two measurements on the same items are not independent, which makes this test conservative: it finds fewer
differences than a paired one, whose p-value (`evaluation.significance.paired`) takes its place where it is known. All
tests of one comparison share the level `alpha` by Holm's step-down procedure (Holm 1979, "A simple sequentially
rejective multiple test procedure"). Figures without a standard error (times, memory, counts) are compared by their
relative change, which must exceed `tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["first", "same", "better", "worse", "noise", "gone"]


@dataclass(frozen=True)
class Figure:
    """One number with its standard error (None if it has none) and the direction that is good."""

    value: float
    stderr: float | None
    higher_is_better: bool = False


@dataclass(frozen=True)
class Judgement:
    """p_value: two-sided, before Holm's correction; None where nothing was tested."""

    verdict: Verdict
    p_value: float | None = None


def judge(
    pairs: Sequence[tuple[Figure, Figure | None]],
    *,
    alpha: float = 0.05,
    tolerance: float = 0.1,
    paired: Sequence[float | None] = (),
) -> tuple[Judgement, ...]:
    """A judgement for each (figure of now, figure of before), in order; before may be None: the first of its kind.

    alpha: the chance that any of all tested differences is called one although there is none. tolerance: relative.
    paired: for each the p-value of a test on the same items, or None for the z test; empty if there is none at all.
    """
    p_values = [
        known if known is not None or before is None else p_value(now, before)
        for (now, before), known in zip(pairs, paired or [None] * len(pairs), strict=True)
    ]
    significant = holm(p_values, alpha)
    return tuple(
        _judgement(now, before, p, differs, tolerance)
        for (now, before), p, differs in zip(pairs, p_values, significant, strict=True)
    )


def p_value(now: Figure, before: Figure) -> float | None:
    """Of the two-sided z test; None if either has no standard error, neither has any noise, or one is not finite."""
    if now.stderr is None or before.stderr is None:
        return None
    spread = math.hypot(now.stderr, before.stderr)
    difference = now.value - before.value
    if not math.isfinite(spread) or not math.isfinite(difference) or spread == 0:
        return None
    return math.erfc(abs(difference) / spread / math.sqrt(2))


def holm(p_values: Sequence[float | None], alpha: float) -> tuple[bool, ...]:
    """Which hypotheses are rejected at family-wise level alpha; None is no hypothesis."""
    ordered = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    rejected = [False] * len(p_values)
    for rank, (p, index) in enumerate(ordered):
        if p > alpha / (len(ordered) - rank):
            break
        rejected[index] = True
    return tuple(rejected)


def _judgement(now: Figure, before: Figure | None, p: float | None, significant: bool, tolerance: float) -> Judgement:
    if before is None:
        return Judgement("first")
    if now.value == before.value or (math.isnan(now.value) and math.isnan(before.value)):
        return Judgement("same", p)
    differs = significant if p is not None else _beyond(now.value, before.value, tolerance)
    if not differs:
        return Judgement("noise", p)
    return Judgement("better" if _improved(now, before) else "worse", p)


def _beyond(now: float, before: float, tolerance: float) -> bool:
    """A broken model's infinity and NaN are beyond every tolerance."""
    change = abs(now - before)
    return not math.isfinite(change) or change > tolerance * abs(before)


def _improved(now: Figure, before: Figure) -> bool:
    if math.isnan(now.value) or math.isnan(before.value):
        return math.isnan(before.value)
    return (now.value > before.value) == now.higher_is_better
