"""Checkpoints beside each other on the same items, from the samples that their evaluations left in the store."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from evaluation.report import Average, EvalReport
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import ArtifactMissing
from infra.results.rows import DENSE, MetricRow, PairRow

if TYPE_CHECKING:
    from evaluation.samples import Sample
    from evaluation.significance.paired import Paired

SAMPLES_FILE = "samples.parquet"

_KEPT = 16

log = logging.getLogger("slimline")


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation left: its samples (without texts), and which of its figures are averages of others."""

    samples: tuple[Sample, ...]
    averages: tuple[Average, ...]


@dataclass(frozen=True)
class Beside:
    """The figures of one checkpoint beside another's, and by figure a sentence for each that could not be paired."""

    rows: tuple[PairRow, ...]
    problems: Mapping[tuple[str, str], str]
    """By task and metric."""


class Reports:
    """Reads finished evaluations, and keeps the last ones in memory."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        # the dense model's are asked for again with every other checkpoint
        self.read = lru_cache(maxsize=_KEPT)(self._read)

    def _read(self, stage_key: str) -> Evaluated:
        """Raises ArtifactMissing if the evaluation is no longer in the store or left no samples."""
        from pyarrow import ArrowException

        from evaluation.samples import read_samples

        folder = self._store.path(ArtifactRef(kind="report", key=stage_key))
        if not (folder / SAMPLES_FILE).exists():
            raise ArtifactMissing(f"report {stage_key} was made before samples were kept: make it anew with --refresh")
        try:
            report = EvalReport.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
            return Evaluated(read_samples(folder / SAMPLES_FILE, texts=False), report.averages)
        except (OSError, ValueError, ArrowException) as error:
            raise ArtifactMissing(
                f"the samples of report {stage_key} cannot be read ({error}): make it anew with --refresh"
            ) from error


def beside(
    rows: Sequence[MetricRow], others: Sequence[MetricRow], reports: Reports, *, reference: str, seed: int = 0
) -> Beside:
    """The figures of one evaluation of a checkpoint beside those of the same evaluation of the `reference`.

    rows, others: of one stage each. Only figures are paired that are those of their samples. Raises ArtifactMissing if
    either has no samples in the store.
    """
    from evaluation.significance.paired import pair

    mine, theirs = reports.read(rows[0].stage_key), reports.read(others[0].stage_key)
    averages = [average for average in mine.averages if average in theirs.averages]
    found, refused = pair(mine.samples, theirs.samples, averages=averages, seed=seed)
    problems = {
        (each.task, each.metric): f"{rows[0].suite}/{each.task}/{each.metric}: {each.reason}" for each in refused
    }
    by_figure = {(each.task, each.metric): each for each in found}
    there = {(row.task, row.metric): row for row in others}
    pairs: list[PairRow] = []
    for row in rows:
        paired, other = by_figure.get((row.task, row.metric)), there.get((row.task, row.metric))
        if paired is None or other is None:
            continue
        if is_of(paired, row.value, other.value):
            pairs.append(_row(row, other, paired, reference))
        else:
            figure = f"{row.suite}/{row.task}/{row.metric}"
            problems[row.task, row.metric] = f"{figure}: the figure is not the mean of its samples"
    return Beside(tuple(pairs), problems)


def beside_dense(metrics: Iterable[MetricRow], store: ArtifactStore) -> tuple[PairRow, ...]:
    """Every measured checkpoint of a run beside the dense one, evaluation by evaluation.

    What cannot be paired is left out, with a line in the log.
    """
    reports, found = Reports(store), list[PairRow]()
    evaluations = by_evaluation(metrics)
    for (checkpoint, suite), rows in evaluations.items():
        others = evaluations.get((DENSE, suite))
        if checkpoint == DENSE or others is None:
            continue
        try:
            answer = beside(rows, others, reports, reference=DENSE)
        except ArtifactMissing as error:
            log.warning("%s of %s is not compared with %s: %s", suite, checkpoint, DENSE, error)
            continue
        for problem in answer.problems.values():
            log.warning("%s: not compared with %s: %s", checkpoint, DENSE, problem)
        found += answer.rows
    return tuple(found)


def by_evaluation(metrics: Iterable[MetricRow]) -> dict[tuple[str, str], list[MetricRow]]:
    """The rows of each checkpoint and suite; a profile has no samples and is left out."""
    found: dict[tuple[str, str], list[MetricRow]] = {}
    for row in metrics:
        if row.suite != "profile":
            found.setdefault((row.checkpoint, row.suite), []).append(row)
    return found


def is_of(paired: Paired, value: float, reference_value: float) -> bool:
    """Whether the two figures are those of the samples; sums in another order differ in their last bits."""
    both = ((value, paired.value), (reference_value, paired.reference_value))
    return all(math.isclose(figure, of_samples, rel_tol=1e-6, abs_tol=1e-9) for figure, of_samples in both)


def as_json(pairs: Iterable[PairRow]) -> str:
    """All pairs as a list of objects."""
    return json.dumps([pair.model_dump(mode="json", exclude={"run_key"}) for pair in pairs], indent=1)


def _row(here: MetricRow, there: MetricRow, paired: Paired, reference: str) -> PairRow:
    return PairRow(
        run_key=here.run_key,
        checkpoint=here.checkpoint,
        reference=reference,
        suite=here.suite,
        task=here.task,
        metric=here.metric,
        value=here.value,
        reference_value=there.value,
        difference=here.value - there.value,
        low=paired.low,
        high=paired.high,
        p_value=paired.p_value,
        test=paired.test,
        num_items=paired.num_items,
        flips_lost=paired.num_lost,
        flips_gained=paired.num_gained,
        higher_is_better=here.higher_is_better is not False,
        stage_key=here.stage_key,
        reference_stage_key=there.stage_key,
    )
