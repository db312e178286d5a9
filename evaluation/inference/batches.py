"""Rows through a model in batches: as large as memory takes, halved where it does not, over copies of the model if any.

Nothing here changes a result beyond the rounding of the kernels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from evaluation.inference.oom import free_memory, short_of_memory
from evaluation.inference.options import EvalOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("slimline")

Row = TypeVar("Row")
Result = TypeVar("Result")
Work = Callable[["PreTrainedModel", Sequence[Row]], list[Result]]
"""Gives one result per row, in order. With replicas it is sent to other processes: a function at the top of a module,
or a functools.partial of one, and its results must be picklable (numbers, CPU tensors)."""

_TOKENS_CPU = 2**11
_TOKENS_ACCELERATOR = 2**14
"""Tokens of a forward pass where the batch size is left open: more of them make it no faster."""


def rows_per_batch(model: PreTrainedModel, length: int, options: EvalOptions) -> int:
    """How many rows of so many tokens to run at once: what is asked for, or what keeps the device busy; at least 1."""
    if options.batch_size is not None:
        return options.batch_size
    tokens = _TOKENS_CPU if model.device.type == "cpu" else _TOKENS_ACCELERATOR
    return max(1, tokens // length)


def batched(lengths: Mapping[int, int], rows_at_once: Callable[[int], int]) -> list[list[int]]:
    """Rows (by number) in batches, the longest first, so that a batch pads little and memory runs short at once.

    lengths: tokens of each row. rows_at_once: how many rows of such a length are a batch. Rows of one batch are
    neighbours in length; equal lengths keep their order.
    """
    order = sorted(lengths, key=lambda row: -lengths[row])
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        count = rows_at_once(lengths[order[start]])
        batches.append(order[start : start + count])
        start += count
    return batches


def run_batches(
    model: PreTrainedModel,
    work: Work[Row, Result],
    rows: Sequence[Row],
    batches: Sequence[Sequence[int]],
    options: EvalOptions,
    *,
    message: str = "{} rows",
) -> list[Result]:
    """The result of every row, in the order of the rows; each is in one of the batches, by its number.

    A batch that does not fit into memory is halved and the work goes on, with a line in the log; nothing that was
    measured is measured again. message: of the progress, with the number of rows that are done.
    Raises what says that memory ran out if a single row does not fit.
    """
    done = 0

    def finished(count: int) -> None:
        nonlocal done
        done += count
        options.progress(done / len(rows), message.format(done))

    inputs = [[rows[index] for index in batch] for batch in batches]
    if options.replicas is not None:
        outputs = options.replicas.run(model, work, inputs, finished)
    else:
        outputs, splitter = [], OomSplitter(work)
        for batch in inputs:
            outputs.append(splitter(model, batch))
            finished(len(batch))
    results = dict(zip(chain.from_iterable(batches), chain.from_iterable(outputs), strict=True))
    return [results[index] for index in range(len(rows))]


class OomSplitter:
    """Work that takes a batch in parts when memory runs out, and later batches in as many: they are planned to need as
    much. One per process."""

    def __init__(self, work: Work[Any, Any]) -> None:
        self._work = work
        self._parts = 1

    def __call__(self, model: PreTrainedModel, rows: Sequence[Any]) -> list[Any]:
        """One result per row."""
        results: list[Any] = []
        while len(results) < len(rows):
            part = rows[len(results) :][: math.ceil(len(rows) / self._parts)]
            try:
                results += self._work(model, part)
                continue
            except (RuntimeError, MemoryError, OSError) as error:
                if len(part) == 1 or not short_of_memory(error):
                    raise
                # the traceback holds the tensors that fill the memory
                error.__traceback__ = None
            self._parts *= 2
            left = math.ceil(len(rows) / self._parts)
            log.warning("out of memory with %d rows at once; going on with %d", len(part), left)
            free_memory()
        return results
