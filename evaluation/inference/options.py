"""How to measure: what no figure depends on. Nothing here imports torch, so that a run can be planned without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float, str], None]
"""Called with the share done in [0, 1] and a short message."""


def silent(share: float, message: str) -> None:
    """A progress that reports nothing."""


def part_of(progress: Progress, start: float, end: float, total: float = 1.0) -> Progress:
    """The progress of a part of the work, from start to end of the total in any unit."""
    return lambda share, message: progress((start + (end - start) * share) / total, message)


class Replicas(Protocol):
    """Further copies of a model that take a part of the work: see evaluation.inference.replicas."""

    def run(
        self, model: PreTrainedModel, work: Any, batches: Sequence[Sequence[Any]], finished: Callable[[int], None]
    ) -> list[list[Any]]:
        """The results of all batches in their order; `finished` is called with the number of rows of each."""
        ...


@dataclass(frozen=True)
class EvalOptions:
    """How to measure, never what: nothing here changes a figure.

    batch_size: most rows of a forward pass; None for as many as memory takes. replicas: copies of the model in other
    processes, which take a part of the rows.
    """

    batch_size: int | None = None
    progress: Progress = silent
    replicas: Replicas | None = None
