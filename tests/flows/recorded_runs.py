"""Recorded runs with their samples in the store, without a run: for tests of what is made of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

from evaluation.report import Average, EvalReport, Metric
from evaluation.samples import Sample, write_samples
from evaluation.significance.paired import is_exponential
from infra.artifacts.store import ArtifactRef
from infra.results.lineage import checkpoint_rows
from infra.results.older_formats import made_by
from infra.results.rows import MetricRow, RunRow
from tests.flows.home import Home

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Evaluation:
    """What one suite measured on one checkpoint."""

    samples: Sequence[Sample]
    suite: str = "zero_shot"
    protocol: Mapping[str, Any] = field(default_factory=lambda: {"limit": None, "dtype": "torch.float32"})
    averages: tuple[Average, ...] = ()
    more: tuple[Metric, ...] = ()
    reference: str | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The figures that follow from the samples, and more."""
        import numpy as np

        places = dict.fromkeys((sample.task, name) for sample in self.samples for name in sample.scores)
        found = []
        for task, name in places:
            mine = [sample for sample in self.samples if sample.task == task and name in sample.scores]
            value = np.average([s.scores[name] for s in mine], weights=[s.weight for s in mine])
            value = float(np.exp(value) if is_exponential(name) else value)
            better = not is_exponential(name)
            found.append(Metric(task=task, metric=name, value=value, num_examples=len(mine), higher_is_better=better))
        return (*found, *self.more)


@dataclass(frozen=True)
class Records(Home):
    """A home whose runs were never run."""

    def add(
        self,
        name: str,
        checkpoints: Mapping[str, Sequence[Evaluation]],
        *,
        version: int = 0,
        spec: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """A run of that name in which the checkpoints were measured; returns its key."""
        key = f"run-{name}-v1-{version:016x}"
        rows: list[MetricRow] = []
        for checkpoint, evaluations in checkpoints.items():
            for evaluation in evaluations:
                rows += self._measure(key, checkpoint, evaluation)
        run = RunRow(
            run_key=key,
            name=name,
            spec=json.dumps(dict(spec)),
            status="completed",
            started_at=NOON,
            finished_at=NOON + timedelta(minutes=version),
            slimline_version="0",
        )
        keys = {checkpoint: f"prune-{checkpoint}" for checkpoint in checkpoints}
        made = checkpoint_rows(key, spec.get("model") or {}, made_by(spec), keys)
        self.results.record(run, metrics=rows, checkpoints=made)
        return key

    def report(self, key: str, checkpoint: str, suite: str) -> ArtifactRef:
        """Where an evaluation of a run lies."""
        return ArtifactRef(kind="report", key=f"evaluate-{suite.replace('_', '-')}-v1-{key}.{checkpoint}")

    def _measure(self, key: str, checkpoint: str, evaluation: Evaluation) -> list[MetricRow]:
        ref = self.report(key, checkpoint, evaluation.suite)
        report = EvalReport(
            suite=evaluation.suite,
            metrics=evaluation.metrics,
            protocol=dict(evaluation.protocol),
            averages=evaluation.averages,
        )
        request = {"reference": evaluation.reference} if evaluation.reference else {}
        with self.store.writing(ref, request=request, versions={}) as folder:
            (folder / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
            write_samples(evaluation.samples, folder / "samples.parquet")
        return [
            MetricRow(
                run_key=key,
                checkpoint=checkpoint,
                checkpoint_key=f"prune-{checkpoint}",
                stage_key=ref.key,
                suite=evaluation.suite,
                protocol=json.dumps(dict(evaluation.protocol)),
                **metric.model_dump(),
            )
            for metric in report.metrics
        ]
