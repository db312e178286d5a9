"""Copies of one model in processes of their own, one per device, that share the rows of a measurement.

The process that measures has the model too and does its part; each takes the next batch when it is ready with one.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from evaluation.inference.batches import OomSplitter, Result, Row, Work
from evaluation.inference.child_process import end_with_parent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import PreTrainedModel

Loader = Callable[..., "PreTrainedModel"]
"""Loads a checkpoint: called with its folder and the keyword arguments of one process; a function of a module."""


class ReplicaProcesses:
    """Its processes live from start to end; as a context manager, as long as the block, and in any case no longer than
    this process.

    loads: for each further process the keyword arguments that tell `loader` on which device to put the model.
    """

    def __init__(self, folder: Path, loader: Loader, loads: Sequence[Mapping[str, Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._share = max(1, torch.get_num_threads() // (len(loads) + 1))
        self._mates: list[tuple[Any, Connection]] = []
        for load in loads:
            here, there = context.Pipe()
            mate = context.Process(target=_serve, args=(there, folder, loader, dict(load), self._share), daemon=True)
            self._mates.append((mate, here))

    def start(self) -> None:
        """Start the processes; each loads its copy when it first has work."""
        for mate, _ in self._mates:
            mate.start()

    def end(self) -> None:
        """End those that were started; for good."""
        started = [mate for mate, _ in self._mates if mate.pid is not None]
        for mate in started:
            mate.terminate()
        for mate in started:
            mate.join()

    @property
    def alive(self) -> bool:
        """Whether every process was started and none has ended."""
        return all(mate.is_alive() for mate, _ in self._mates)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def run(
        self,
        model: PreTrainedModel,
        work: Work[Row, Result],
        batches: Sequence[Sequence[Row]],
        finished: Callable[[int], None],
    ) -> list[list[Result]]:
        """The results of all batches in their order; `finished` is called in this thread or another, one at a time,
        with the rows of each batch. Raises the first error of any process; RuntimeError if one of them died."""
        results: dict[int, list[Result]] = {}
        errors: list[BaseException] = []
        numbers, telling = count(), threading.Lock()

        def take(answer: Callable[[Sequence[Row]], list[Result]]) -> None:
            # itertools.count is atomic under the interpreter's lock: each batch is taken once
            while not errors and (number := next(numbers)) < len(batches):
                try:
                    found = answer(batches[number])
                    with telling:
                        results[number] = found
                        finished(len(batches[number]))
                except BaseException as error:  # also Ctrl-C: the other threads must not wait for ever
                    errors.append(error)
                    return

        threads = [
            threading.Thread(target=take, args=(_asker(mate, line, work),), daemon=True) for mate, line in self._mates
        ]
        for thread in threads:
            thread.start()
        splitter = OomSplitter(work)
        with _threads(self._share):
            take(lambda rows: splitter(model, rows))
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[number] for number in range(len(batches))]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute in so many threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _asker(mate: Any, line: Connection, work: Work[Row, Result]) -> Callable[[Sequence[Row]], list[Result]]:
    # sent once: what a work holds (a tokenizer) takes longer to send than the rows
    unsent: list[Work[Row, Result]] = [work]

    def ask(rows: Sequence[Row]) -> list[Result]:
        try:
            line.send((unsent.pop() if unsent else None, rows))
            answer = line.recv()
        except (EOFError, OSError) as error:
            mate.join(timeout=1.0)
            perhaps = ", perhaps out of memory" if mate.exitcode == -signal.SIGKILL else ""
            raise RuntimeError(f"a process of the evaluation died (exit code {mate.exitcode}){perhaps}") from error
        if isinstance(answer, BaseException):
            raise answer
        found: list[Result] = answer
        return found

    return ask


def _serve(line: Connection, folder: Path, loader: Loader, load: dict[str, Any], threads: int) -> None:
    """One further process."""
    end_with_parent()
    torch.set_num_threads(threads)
    model: PreTrainedModel | None = None
    splitter: OomSplitter | None = None
    while True:
        work, rows = line.recv()
        if work is not None:
            splitter = OomSplitter(work)
        assert splitter is not None
        try:
            if model is None:
                model = loader(folder, **load).eval()
            line.send(splitter(model, rows))
        except Exception as error:  # whatever it is, the parent raises it
            _send_error(line, error)


def _send_error(line: Connection, error: Exception) -> None:
    """Send the error if the parent can rebuild it, else a RuntimeError with its type and words."""
    words = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        # rebuilt as the parent does it; what cannot be sent fails before anything is
        line.send(error if type(deepcopy(error)) is type(error) else words)
    except Exception:  # classes may raise what they like
        line.send(words)
