"""Curves of a running stage: they grow in the MLflow run of the checkpoint that it makes, below that of its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from threading import Event
from typing import Any, Protocol

from infra.settings import Settings
from infra.tracking.live import LiveCurves
from infra.tracking.mlflow_store import load
from infra.tracking.records import TRAINING, MetricPoint
from infra.tracking.tracker import LiveRun, Tracker


class Curves(Protocol):
    """Called at every step of a training, or with every layer that is pruned, with what was measured there, by metric.

    section: what stands before the metrics' names.
    """

    def __call__(self, step: int, values: Mapping[str, float], section: str = TRAINING) -> None:
        """Take note; returns at once and raises nothing because of who listens."""
        ...


def no_curves(step: int, values: Mapping[str, float], section: str = TRAINING) -> None:
    """Nobody listens: the stage does not belong to a run."""


@dataclass(frozen=True)
class InRun:
    """The run that a stage is made for, how its checkpoint is named there, and when the run began."""

    run_key: str
    run_name: str
    checkpoint: str
    began_at: datetime | None = field(default=None, compare=False)


@contextmanager
def live_curves(settings: Settings, in_run: InRun | None, importing: AbstractContextManager[Any]) -> Iterator[Curves]:
    """The Curves of one running stage; what they gathered is sent when the block ends.

    importing: held while mlflow is imported, when there is a first point.
    """
    if in_run is None:
        yield no_curves
        return
    began_ms = None if in_run.began_at is None else int(in_run.began_at.timestamp() * 1000)
    run = LiveRun(Tracker(settings.tracking_uri), in_run.run_key, in_run.run_name, in_run.checkpoint, began_ms)

    @cache
    def load_in_turn() -> None:
        with importing:
            load()

    def send(points: Sequence[MetricPoint], over: Event) -> None:
        load_in_turn()
        run.log(points, over)

    with LiveCurves(send, in_run.checkpoint) as curves:
        yield curves
