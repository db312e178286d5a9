"""Copies of one model in processes of their own, one per device, that share the rows of a measurement.

The process that measures has the model too and does its part; each takes the next batch when it is ready with one.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from evaluation.inference.batches import OomSplitter, Result, Row, Work
from evaluation.inference.global_state import torch_threads

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import PreTrainedModel

Loader = Callable[..., "PreTrainedModel"]
"""Loads a checkpoint: called with its folder and the keyword arguments of one process; a function of a module."""


class ReplicaProcesses:
    """Its processes live from start to end; as a context manager, as long as the block.

    loads: for each further process the keyword arguments that tell `loader` on which device to put the model.
    initializer: called first in each of them, such as what ends it with this process; a function of a module.
    """

    def __init__(
        self,
        folder: Path,
        loader: Loader,
        loads: Sequence[Mapping[str, Any]],
        *,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._share = max(1, torch.get_num_threads() // (len(loads) + 1))
        self._processes: list[tuple[Any, Connection]] = []
        for load in loads:
            here, there = context.Pipe()
            given = (there, folder, loader, dict(load), self._share, initializer)
            self._processes.append((context.Process(target=_serve, args=given, daemon=True), here))

    def start(self) -> None:
        """Start the processes; each loads its copy when it first has work."""
        for process, _ in self._processes:
            process.start()

    def end(self) -> None:
        """End the processes that were started; they cannot be started again."""
        started = [process for process, _ in self._processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join()

    @property
    def alive(self) -> bool:
        """Whether every process was started and none has ended."""
        return all(process.is_alive() for process, _ in self._processes)

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
        numbers, lock = count(), threading.Lock()

        def take(answer: Callable[[Sequence[Row]], list[Result]]) -> None:
            # itertools.count is atomic under the interpreter's lock: each batch is taken once
            while not errors and (number := next(numbers)) < len(batches):
                try:
                    answers = answer(batches[number])
                    with lock:
                        results[number] = answers
                        finished(len(batches[number]))
                except BaseException as error:  # also Ctrl-C: the other threads must not wait for ever
                    errors.append(error)
                    return

        threads = [
            threading.Thread(target=take, args=(_asker(process, pipe, work),), daemon=True)
            for process, pipe in self._processes
        ]
        for thread in threads:
            thread.start()
        splitter = OomSplitter(work)
        with torch_threads(self._share):
            take(lambda rows: splitter(model, rows))
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[number] for number in range(len(batches))]


def _asker(process: Any, pipe: Connection, work: Work[Row, Result]) -> Callable[[Sequence[Row]], list[Result]]:
    # sent once: what a work holds (a tokenizer) takes longer to send than the rows
    unsent: list[Work[Row, Result]] = [work]

    def ask(rows: Sequence[Row]) -> list[Result]:
        try:
            pipe.send((unsent.pop() if unsent else None, rows))
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            process.join(timeout=1.0)
            perhaps = ", perhaps out of memory" if process.exitcode == -signal.SIGKILL else ""
            raise RuntimeError(f"a process of the evaluation died (exit code {process.exitcode}){perhaps}") from error
        if isinstance(answer, BaseException):
            raise answer
        results: list[Result] = answer
        return results

    return ask


def _serve(
    pipe: Connection,
    folder: Path,
    loader: Loader,
    load: dict[str, Any],
    threads: int,
    initializer: Callable[[], None] | None,
) -> None:
    """One further process: loads its copy with its first rows, and answers each batch until it is ended."""
    if initializer is not None:
        initializer()
    torch.set_num_threads(threads)
    model: PreTrainedModel | None = None
    splitter: OomSplitter | None = None
    while True:
        work, rows = pipe.recv()
        if work is not None:
            splitter = OomSplitter(work)
        assert splitter is not None
        try:
            if model is None:
                model = loader(folder, **load).eval()
            pipe.send(splitter(model, rows))
        except Exception as error:  # whatever it is, the parent raises it
            _send_error(pipe, error)


def _send_error(pipe: Connection, error: Exception) -> None:
    """Send the error if the parent can rebuild it, else a RuntimeError with its type and words."""
    words = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        # rebuilt as the parent does it; what cannot be sent fails before anything is
        pipe.send(error if type(deepcopy(error)) is type(error) else words)
    except Exception:  # classes may raise what they like
        pipe.send(words)
