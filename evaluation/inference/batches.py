"""Rows through a model in batches: as large as memory takes, halved where it does not, over copies of the model if any.

Nothing here changes a result beyond the rounding of the kernels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from evaluation.inference.oom import short_of_memory
from evaluation.inference.options import EvalOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("slimline")

Row = TypeVar("Row")
Result = TypeVar("Result")
Work = Callable[["PreTrainedModel", Sequence[Row]], list[Result]]
"""Gives one result per row, in order. With a crew it is sent to other processes: a function at the top of a module, or
a functools.partial of one, and its results must be picklable (numbers, CPU tensors)."""

_TOKENS_CPU = 2**11
_TOKENS_ACCELERATOR = 2**14
"""Tokens of a forward pass where the batch size is left open: more of them make it no faster."""


def rows_per_batch(model: PreTrainedModel, length: int, options: EvalOptions) -> int:
    """How many rows of so many tokens to run at once: what is asked for, or what keeps the device busy; at least 1."""
    if options.batch_size is not None:
        return options.batch_size
    tokens = _TOKENS_CPU if model.device.type == "cpu" else _TOKENS_ACCELERATOR
    return max(1, tokens // length)


def batched(
    model: PreTrainedModel, rows: Sequence[Row], lengths: Sequence[int], options: EvalOptions
) -> list[list[int]]:
    """Indices of the rows in batches, longest rows first, so that a batch pads little and memory runs short at once.

    lengths: tokens of each row. Rows of one batch are neighbours in length; equal lengths keep their order.
    """
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        count = rows_per_batch(model, lengths[order[start]], options)
        batches.append(order[start : start + count])
        start += count
    return batches


def run_batches(
    model: PreTrainedModel,
    work: Work[Row, Result],
    batches: Sequence[Sequence[Row]],
    options: EvalOptions,
    *,
    told: Callable[[int], str] = "{} rows".format,
) -> list[list[Result]]:
    """The results of every row of every batch, in their order.

    A batch that does not fit into memory is halved and the work goes on, with a line in the log; nothing that was
    measured is measured again. told: what the progress says after so many rows.
    Raises what says that memory ran out if a single row does not fit.
    """
    total = max(1, sum(map(len, batches)))
    done = 0

    def finished(rows: int) -> None:
        nonlocal done
        done += rows
        options.progress(min(1.0, done / total), told(done))

    if options.replicas is None:
        splitter = OomSplitter(work)
        results = []
        for batch in batches:
            results.append(splitter(model, batch))
            finished(len(batch))
        return results
    return options.replicas.run(model, work, batches, finished)


class OomSplitter:
    """Work that takes a batch in parts when memory runs out, and later batches in as many: they are planned to need as
    much. One per process."""

    def __init__(self, work: Work[Any, Any]) -> None:
        self._work = work
        self._parts = 1

    def __call__(self, model: PreTrainedModel, rows: Sequence[Any]) -> list[Any]:
        """One result per row."""
        found: list[Any] = []
        while len(found) < len(rows):
            part = rows[len(found) : len(found) + self._rows_of(rows)]
            try:
                found += self._work(model, part)
            except (RuntimeError, MemoryError, OSError) as error:
                if len(part) == 1 or not short_of_memory(error):
                    raise
                # the traceback holds the tensors that fill the memory
                error.__traceback__ = None
                self._parts *= 2
                log.warning("out of memory with %d rows at once; going on with %d", len(part), self._rows_of(rows))
            else:
                continue
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
        return found

    def _rows_of(self, rows: Sequence[Any]) -> int:
        """How many rows of a batch are a part."""
        return math.ceil(len(rows) / self._parts)
