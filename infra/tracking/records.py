"""What is logged about a run, in the form in which the tracker takes it. Imports no mlflow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from infra.tracking import mlflow_rules as rules

#: before the name of what a training measures, in the run of the checkpoint that it makes
TRAINING = "training"
#: before the name of what pruning measures layer by layer
LAYERS = "layers"

Status = Literal["completed", "failed"]


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
class DataInput:
    """A data set that was read. digest: tells its content from any other's. context: what for ("calibration", ...).

    hub: where it is on the Hugging Face hub (path, and perhaps config and split); empty for local data.
    """

    name: str
    digest: str
    context: str
    hub: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunContent:
    """What one MLflow run holds. artifacts: a text by its path in the run. images: what draws one, by its path; only
    their paths make a record new, for they show what else is in it. description: markdown.

    began_ms, ended_ms (since 1970): when what it tells of was done; None for the moments in which it is recorded. A
    run keeps the beginning that it was made with, and moments alone do not make a record new.
    """

    name: str
    status: Status = "completed"
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[MetricPoint] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    description: str = ""
    inputs: Sequence[DataInput] = ()
    began_ms: int | None = None
    ended_ms: int | None = None

    def plain(self) -> list[Any]:
        """All but the moments, as JSON can hold it."""
        points = [(point.key, point.value, point.step) for point in self.metrics]
        inputs = [(data.name, data.digest, data.context, dict(data.hub)) for data in self.inputs]
        mappings = [dict(self.params), dict(self.tags), dict(self.artifacts)]
        images = [sorted(self.images)] if self.images else []  # records without any have the digest they always had
        return [self.name, self.status, points, inputs, self.description, mappings, *images]


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """One checkpoint of a run: a run below that of the run. key: of its artifact. folder: where it lies, if anywhere.

    label: its name in the run, by which it is found again.
    """

    label: str
    key: str
    content: RunContent
    folder: Path | None = None

    def plain(self) -> list[Any]:
        """All but the moments, as JSON can hold it."""
        folder = None if self.folder is None else str(self.folder.absolute())
        return [self.label, self.key, folder, self.content.plain()]

    def digest(self) -> str:
        """sha256 (hex) of the content, by which an unchanged checkpoint is left as it is."""
        return _sha256(self.plain())


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The argument of `Tracker.record`, whose digest says whether it is recorded already.

    columns: the metrics that are worth a column in the table of all checkpoints; they alone do not make a record new.

    Checkpoints are registered, where they lie, as versions of the model that has the name of the run. aliases: labels
    by the alias that their versions get. above: keys of recorded runs that are shown below this one (of a night, its
    cells).
    """

    run_key: str
    content: RunContent
    checkpoints: Sequence[CheckpointRecord] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    above: Sequence[str] = ()
    columns: Sequence[str] = ()

    def digest(self) -> str:
        """sha256 (hex) of the content. Not a cache key: here a metric may be NaN and a path means that very folder."""
        checkpoints = [checkpoint.plain() for checkpoint in self.checkpoints]
        return _sha256([self.run_key, self.content.plain(), checkpoints, dict(self.aliases), list(self.above)])


def _sha256(plain: list[Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


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
