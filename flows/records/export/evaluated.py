"""One checkpoint of a run with the figures of its evaluations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from infra.results.rows import CheckpointRow, MetricRow, RunRow
from infra.results.store import ResultsStore


@dataclass(frozen=True)
class Evaluated:
    """metrics: of all suites but the profile, at least one. row: how it was made; None in records of an older slimline.

    name: what it is called elsewhere, "<run>/<checkpoint>".
    """

    run: RunRow
    checkpoint: str
    row: CheckpointRow | None
    metrics: tuple[MetricRow, ...]

    @property
    def name(self) -> str:
        """Of the model, for programs that know one name only."""
        return f"{self.run.name}/{self.checkpoint}"

    @property
    def made_by(self) -> dict[str, str]:
        """What is known of how it was made, in words."""
        known = {"run": self.run.run_key, "checkpoint": self.metrics[0].checkpoint_key}
        if self.row is not None:
            known |= {
                "base_model": self.row.model,
                "method": self.row.method or "",
                "sparsity": "" if self.row.total_sparsity is None else f"{self.row.total_sparsity:g}",
                "recovery": self.row.recovery or "",
                "num_parameters": "" if self.row.num_parameters is None else str(self.row.num_parameters),
            }
        return {word: value for word, value in known.items() if value}

    def tasks(self) -> dict[str, list[MetricRow]]:
        """The figures by task; a task that several suites measure has the suite before its name."""
        suites = {(row.suite, row.task) for row in self.metrics}
        several = Counter(task for _, task in suites)
        found: dict[str, list[MetricRow]] = {}
        for row in self.metrics:
            name = f"{row.suite}/{row.task}" if several[row.task] > 1 else row.task
            found.setdefault(name, []).append(row)
        return found


def evaluated(store: ResultsStore, run: RunRow) -> Iterator[Evaluated]:
    """The checkpoints of a run that were evaluated, in the order in which they were."""
    metrics: dict[str, list[MetricRow]] = {}
    for row in store.metrics(run.run_key):
        if row.suite != "profile":
            metrics.setdefault(row.checkpoint, []).append(row)
    rows = {row.checkpoint: row for row in store.checkpoints(run.run_key)}
    for name, figures in metrics.items():
        yield Evaluated(run, name, rows.get(name), tuple(figures))


def protocol_of(row: MetricRow) -> dict[str, Any]:
    """How a figure was taken."""
    protocol: dict[str, Any] = json.loads(row.protocol)
    return protocol


def common(rows: Sequence[MetricRow], key: str) -> Any:
    """What the protocols of all figures that say it agree on; None if they do not."""
    said = [protocol[key] for row in rows if key in (protocol := protocol_of(row))]
    return said[0] if said and all(value == said[0] for value in said) else None


def data_of(row: MetricRow) -> dict[str, Any] | None:
    """The data set of a figure, if its suite reads a single one."""
    found = protocol_of(row).get("data_identity") or []
    return dict(found[0]) if len(found) == 1 and isinstance(found[0], dict) else None
