"""Curves while they grow: a stage says what it measured at a step, and a thread hands it to MLflow now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from types import TracebackType
from typing import Self

from infra.errors import TrackingUnusable
from infra.secrets import redacted
from infra.tracking.records import TRAINING, MetricPoint

#: logs points, unless the event is set before it comes to that; `LiveRun.log`
Log = Callable[[Sequence[MetricPoint], threading.Event], None]

_SECONDS_AFTER_ERROR = 3.0

log = logging.getLogger("slimline")


class LiveCurves:
    """Gathers the points of what makes one checkpoint (`name`) and has them logged as "<section>/<metric>": the first
    ones at once, later ones every `interval_seconds`, the rest when the block ends.

    Nothing that goes wrong with that ends the stage. It costs one warning and `patience_seconds` without another
    try; at the end it is waited for as long as `last_seconds`, after an error, an interrupt perhaps, briefly.
    What is not logged then comes with the run's record.
    """

    def __init__(
        self,
        send: Log,
        name: str,
        *,
        interval_seconds: float = 10.0,
        patience_seconds: float = 300.0,
        last_seconds: float = 20.0,
    ) -> None:
        self._send, self._name = send, name
        self._interval_seconds, self._patience_seconds = interval_seconds, patience_seconds
        self._last_seconds = last_seconds
        self._points: list[MetricPoint] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed, self._over = threading.Event(), threading.Event()
        self._warned = False

    def __call__(self, step: int, values: Mapping[str, float], section: str = TRAINING) -> None:
        """Take note of the values of some metrics at a step; returns at once."""
        now = int(time.time() * 1000)
        points = [MetricPoint(f"{section}/{metric}", float(value), step, now) for metric, value in values.items()]
        with self._lock:
            self._points += points
            if self._thread is None:
                self._thread = self._started()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._closed.set()
        seconds = self._last_seconds if error is None else min(self._last_seconds, _SECONDS_AFTER_ERROR)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._over.set()
            self._warn(f"MLflow has not answered for {seconds:g} s; the rest is recorded with the run")

    def _started(self) -> threading.Thread:
        """In the context of the stage's thread, by which Prefect knows whose log it is."""
        run = copy_context().run
        thread = threading.Thread(target=run, args=(self._work,), name=f"curves of {self._name}", daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        answers, pause = True, 0.0
        while not self._closed.wait(pause):
            answers = self._sent()
            pause = self._interval_seconds if answers else self._patience_seconds
        if answers:
            self._sent()

    def _sent(self) -> bool:
        """Whether all that was gathered is logged."""
        with self._lock:
            points, self._points = self._points, []
        if not points:
            return True
        try:
            self._send(points, self._over)
        except Exception as error:  # of the server, of its client: none of them is worth a stage
            with self._lock:
                self._points = points + self._points
            known = isinstance(error, TrackingUnusable)
            self._warn(str(error) if known else f"{type(error).__name__}: {redacted(str(error))}")
            return False
        return True

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("the curves of %s are not shown while they grow: %s", self._name, problem)
