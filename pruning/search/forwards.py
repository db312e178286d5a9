"""What a search costs beside its candidates, counted in forwards before it begins."""

from __future__ import annotations

from pruning.errors import PruningError
from pruning.gradients.backward import FORWARDS

#: the dense model over the held-out windows, the walk that fills the database, and the last refit
OTHERS = 3


def forwards_of_knapsack(steps: int) -> int:
    """Sensitivities in every step, and a refit after all but the last one, in whose place the database is filled."""
    return (FORWARDS + 1) * steps - 1


def forwards_of_splits(tried: int) -> int:
    """One for each split of a curve that competes, and the dense model's; none where there was nothing to choose."""
    return tried + 1 if tried > 1 else 0


def check_forwards(forwards: int, steps: int | None, splits: int) -> None:
    """Raise PruningError if so many do not suffice for one candidate. steps: of the knapsack at which a search starts,
    None for a curve. splits: that the curve may try."""
    start = forwards_of_splits(splits) if steps is None else forwards_of_knapsack(steps)
    least = start + OTHERS + 1
    if forwards < least:
        way_out = "choose a split" if steps is None else f"lower steps (now {steps})"
        raise PruningError(
            f"forwards {forwards} leave none to search with: the start, the levels, one candidate and the last refit "
            f"take {least}; set forwards to {least} or more, or {way_out}"
        )
