"""The reports that leave this room: plain numbers, each with the protocol under which it was taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, JsonValue

GIB = 2**30
"""Bytes in a GiB, the unit of every memory figure here."""


class Report(BaseModel, frozen=True, extra="forbid", ser_json_inf_nan="strings"):
    """Frozen, refuses unknown keys; infinity (the ppl of a broken model) survives a round trip through JSON."""


class Metric(Report):
    """One number of one task.

    `stderr` is None where none can be computed (one window, one example). `num_examples` counts documents for lm-eval
    tasks, windows for perplexity and timed runs for a profile. `task_version` is lm-eval's version of the task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    num_fewshot: int | None = None
    num_examples: int | None = None
    task_version: str | None = None
    higher_is_better: bool


class Average(Report):
    """A metric that is the mean of other tasks' metrics, its `parts` (task, metric), so that it too can be paired.

    weighted_by: each part counts the same, or each item. A part may be an average itself, if it comes before.
    """

    task: str
    metric: str
    parts: tuple[tuple[str, str], ...]
    weighted_by: Literal["tasks", "items"]


def plain_mean(average: Average, metrics: Sequence[Metric]) -> Metric:
    """The mean of the metrics, each counting the same; their errors are independent."""
    errors = [metric.stderr for metric in metrics if metric.stderr is not None]
    return Metric(
        task=average.task,
        metric=average.metric,
        value=math.fsum(metric.value for metric in metrics) / len(metrics),
        stderr=math.hypot(*errors) / len(metrics) if len(errors) == len(metrics) else None,
        num_fewshot=metrics[0].num_fewshot,
        num_examples=sum(metric.num_examples or 0 for metric in metrics),
        higher_is_better=True,
    )


class EvalReport(Report):
    """All metrics of one suite. `protocol` holds whatever must be printed beside the figures to reproduce them.

    averages: which of the metrics are means of others.
    """

    suite: str
    metrics: tuple[Metric, ...]
    protocol: dict[str, JsonValue]
    averages: tuple[Average, ...] = ()
