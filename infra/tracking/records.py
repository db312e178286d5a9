"""What is logged about a run, in the form in which the tracker takes it. Imports no mlflow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infra.tracking import mlflow_rules as rules


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of one metric; `step` counts whatever the metric runs over (training steps, layers).

    `at_ms`: when it was found, in milliseconds since 1970; None for the moment in which it is logged.
    """

    key: str
    value: float
    step: int = 0
    at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The arguments of one `Tracker.record`, whose digest says whether they are recorded already."""

    run_key: str
    name: str
    params: Mapping[str, str]
    metrics: Sequence[MetricPoint]
    tags: Mapping[str, str]
    artifacts: Mapping[str, str]
    checkpoints: Mapping[str, Path]
    status: str

    def digest(self) -> str:
        """sha256 (hex) of the content. Not a cache key: here a metric may be NaN and a path means that very folder."""
        points = [(point.key, point.value, point.step) for point in self.metrics]
        folders = {word: str(folder.absolute()) for word, folder in self.checkpoints.items()}
        mappings = [dict(self.params), dict(self.tags), dict(self.artifacts), folders]
        text = json.dumps([self.run_key, self.name, self.status, points, mappings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def new_points(points: Sequence[MetricPoint], logged: Callable[[str], Mapping[int, str]]) -> list[MetricPoint]:
    """The points, with keys that MLflow accepts, whose value is not the one that was logged last at their step.

    logged: by the key in MLflow, the last values by step, as `stored` has them. Of a key's equal steps the last counts.
    """
    wanted: dict[str, dict[int, MetricPoint]] = {}
    for point in points:
        wanted.setdefault(point.key, {})[point.step] = point
    new = []
    for key, steps in rules.accepted_keys(wanted).items():
        before = logged(key)
        for step, point in steps.items():
            if before.get(step) != rules.stored(float(point.value)):
                new.append(replace(point, key=key))
    return new
