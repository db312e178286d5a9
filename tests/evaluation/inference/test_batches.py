"""Batches: longest rows first, halved when memory is short, shared with other processes; results as of one by one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from evaluation.inference.batches import batched, rows_per_batch, run_batches
from evaluation.inference.options import EvalOptions
from evaluation.inference.replicas import ReplicaProcesses
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow  # not in `make test-fast`

ROWS = [tuple(range(3, 3 + length)) for length in (5, 9, 2, 9, 7, 4, 6)]


@torch.inference_mode()
def last_logit(model: PreTrainedModel, rows: Sequence[tuple[int, ...]]) -> list[float]:
    return [float(model(torch.tensor([row])).logits[0, -1, 0]) for row in rows]


def who(model: PreTrainedModel, rows: Sequence[int]) -> list[int]:
    return [os.getpid()] * len(rows)


class Narrow:
    """Holds so many rows and no more."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error = most, error
        self.taken: list[int] = []

    def __call__(self, model: PreTrainedModel, rows: Sequence[int]) -> list[int]:
        self.taken.append(len(rows))
        if len(rows) > self.most:
            raise self.error
        return [row * row for row in rows]


def run(model: PreTrainedModel, work: Any, batches: Sequence[Sequence[Any]], options: EvalOptions) -> list[Any]:
    """The results of the rows of all batches."""
    numbers = count()
    numbered = [[next(numbers) for _ in batch] for batch in batches]
    return run_batches(model, work, [row for batch in batches for row in batch], numbered, options)


def test_results_come_in_the_order_of_the_rows(model: PreTrainedModel) -> None:
    batches = batched({row: row % 3 for row in range(7)}, lambda length: 2)
    assert batches == [[2, 5], [1, 4], [0, 3], [6]]
    assert run_batches(model, Narrow(2, MemoryError()), range(7), batches, EvalOptions()) == [n * n for n in range(7)]


def test_batches_hold_neighbours_in_length_the_longest_first() -> None:
    lengths = dict(enumerate(map(len, ROWS)))
    batches = batched(lengths, lambda length: 3)
    assert [[lengths[index] for index in batch] for batch in batches] == [[9, 9, 7], [6, 5, 4], [2]]
    assert sorted(index for batch in batches for index in batch) == list(range(len(ROWS)))


def test_the_batch_size_is_the_asked_or_what_keeps_the_device_busy(model: PreTrainedModel) -> None:
    assert rows_per_batch(model, 100, EvalOptions(batch_size=3)) == 3
    assert rows_per_batch(model, 128, EvalOptions()) == 16
    assert rows_per_batch(model, 10**6, EvalOptions()) == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")],
)
def test_short_of_memory_batches_are_halved_and_nothing_is_lost(
    model: PreTrainedModel, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    narrow, reported = Narrow(2, error), []
    options = EvalOptions(progress=lambda share, message: reported.append((share, message)))
    with caplog.at_level(logging.WARNING, "slimline"):
        results = run(model, narrow, [list(range(7)), list(range(7, 12))], options)
    assert results == [row * row for row in range(12)]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 7 rows at once; going on with 4",
        "out of memory with 4 rows at once; going on with 2",
    ]
    assert narrow.taken == [7, 4, 2, 2, 2, 1, 2, 2, 1]  # once it is known, too much is not tried again
    assert reported == [(7 / 12, "7 rows"), (1.0, "12 rows")]


def test_long_rows_that_do_not_fit_leave_the_short_ones_their_batches(model: PreTrainedModel) -> None:
    """Memory for 900 tokens, where batches of 1800 and of 2000 were planned."""
    taken: list[int] = []

    def work(model: PreTrainedModel, lengths: Sequence[int]) -> list[int]:
        if sum(lengths) > 900:
            raise torch.OutOfMemoryError
        taken.append(len(lengths))
        return list(lengths)

    results = run(model, work, [[900] * 2, [10] * 200, [10] * 160], EvalOptions())
    assert results == [900] * 2 + [10] * 360
    assert taken == [1, 1, 50, 50, 50, 50, 40, 40, 40, 40]


def test_one_row_that_does_not_fit_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run(model, Narrow(0, torch.OutOfMemoryError("CUDA out of memory")), [[1, 2]], EvalOptions())


def test_any_other_error_is_one(model: PreTrainedModel) -> None:
    narrow = Narrow(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(model, narrow, [[1, 2]], EvalOptions())
    assert narrow.taken == [2]


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    save_checkpoint(model, None, tmp_path)
    return tmp_path


def end(share: float, message: str) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise InterruptedError(message)


def test_replicas_give_what_one_process_gives(model: PreTrainedModel, folder: Path) -> None:
    batches = [ROWS[:3], ROWS[3:5], ROWS[5:]]
    alone = run(model, last_logit, batches, EvalOptions())
    reported: list[str] = []
    threads = torch.get_num_threads()
    with ReplicaProcesses(folder, load_checkpoint, [{"device": "cpu"}]) as replicas:
        together = run(
            model, last_logit, batches, EvalOptions(replicas=replicas, progress=lambda _, text: reported.append(text))
        )
        processes = set(run(model, who, [[1]] * 200, EvalOptions(replicas=replicas)))
        with pytest.raises(IndexError):
            run(model, last_logit, [[(10**6,)]] * 8, EvalOptions(replicas=replicas))
        with pytest.raises(InterruptedError):
            run(model, who, [[1]] * 200, EvalOptions(replicas=replicas, progress=end))
    assert together == alone
    assert len(processes) == 2
    assert reported[-1] == "7 rows"
    assert torch.get_num_threads() == threads


def die(model: PreTrainedModel, rows: Sequence[int]) -> list[int]:
    if rows[0] != os.getpid():
        os._exit(9)
    time.sleep(0.2)
    return list(rows)


@pytest.mark.usefixtures("forked")
def test_a_process_that_dies_is_an_error_and_not_a_wait(model: PreTrainedModel, folder: Path) -> None:
    with (
        ReplicaProcesses(folder, load_checkpoint, [{"device": "cpu"}]) as replicas,
        pytest.raises(RuntimeError, match=r"a process of the evaluation died \(exit code 9\)"),
    ):
        run(model, die, [[os.getpid()]] * 1000, EvalOptions(replicas=replicas))


class Unsendable(Exception):
    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.lock = threading.Lock()


class Unrebuildable(Exception):
    def __init__(self, rows: int, words: str) -> None:
        super().__init__(f"{rows} rows: {words}")


class RebuiltAsSomethingElse(Exception):
    def __reduce__(self) -> tuple[type[list[int]], tuple[()]]:
        return list, ()


class Complaint:
    """Raises in every process but the one that made it."""

    def __init__(self, kind: str) -> None:
        self.kind, self.parent = kind, os.getpid()

    def __call__(self, model: PreTrainedModel, rows: Sequence[int]) -> list[int]:
        if os.getpid() == self.parent:
            time.sleep(0.2)
            return list(rows)
        words = "CUDA out of memory"
        raise {
            "unsendable": Unsendable(words),
            "unrebuildable": Unrebuildable(len(rows), words),
            "something else": RebuiltAsSomethingElse(words),
        }[self.kind]


@pytest.mark.usefixtures("forked")
def test_an_error_that_cannot_be_sent_keeps_its_words(model: PreTrainedModel, folder: Path) -> None:
    sentences = {
        "unsendable": "^Unsendable: CUDA out of memory$",
        "unrebuildable": "^Unrebuildable: 1 rows: CUDA out of memory$",
        "something else": "^RebuiltAsSomethingElse: CUDA out of memory$",
    }
    with ReplicaProcesses(folder, load_checkpoint, [{"device": "cpu"}]) as replicas:
        for kind, sentence in sentences.items():
            with pytest.raises(RuntimeError, match=sentence):
                run(model, Complaint(kind), [[0]] * 1000, EvalOptions(replicas=replicas))
