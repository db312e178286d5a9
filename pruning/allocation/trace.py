"""What an allocation that measures says of its own way: steps of a knapsack, candidates of a search. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

Curves = dict[str, tuple[tuple[int, float], ...]]
"""By metric its points: what it runs over, and the value. A metric's section stands before a slash."""


class AllocationStep(BaseModel):
    """One step of an allocation that measures anew between steps.

    sparsity: share removed after it. predicted_loss: by how much the loss (nats per token) was predicted to rise in
    this step. heldout_kl: to the dense logits after it, nats per token, if there are held-out windows. head_units,
    channels: what is gone of every layer after it. forwards: passes over the calibration tokens that it took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float
    predicted_loss: float
    heldout_kl: float | None = None
    head_units: tuple[int, ...]
    channels: tuple[int, ...]
    forwards: int


class SearchTrial(BaseModel):
    """One candidate of a search over levels, in the order in which they were judged.

    kind: the start (number 0), a candidate made of levels in the database, or the best of them refitted in order.
    forwards: passes that the whole pruning had taken when it was judged; one over a part of the held-out windows counts
    as that part. windows: held-out windows that judged it. heldout_kl: mean KL to the dense logits on these, nats per
    token. accepted: whether it took the place of what it was compared with. moves: by output linear the head units or
    channels that it removes more than that (negative: fewer).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    kind: Literal["start", "candidate", "refit"]
    forwards: float
    windows: int
    heldout_kl: float
    accepted: bool
    moves: dict[str, int] = {}


def search_curves(trials: Sequence[SearchTrial]) -> Curves:
    """The trials as curves: by number the KL and whether it was accepted (of those that all windows judged) and the
    forwards spent, and by whole forwards the best KL that they had led to."""
    windows = max((trial.windows for trial in trials), default=0)
    judged = [trial for trial in trials if trial.windows == windows]
    best: dict[int, float] = {}
    lowest = math.inf
    for trial in judged:
        lowest = min(lowest, trial.heldout_kl)
        best[math.ceil(trial.forwards)] = lowest
    return {
        "search/heldout_kl": tuple((trial.number, trial.heldout_kl) for trial in judged),
        "search/accepted": tuple((trial.number, float(trial.accepted)) for trial in judged),
        "search/forwards": tuple((trial.number, trial.forwards) for trial in trials),
        "search/best_kl_by_forwards": tuple(best.items()),
    }
