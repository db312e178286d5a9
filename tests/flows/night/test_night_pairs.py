"""Figures of two nights on the same items: paired where the samples of both are there, by their errors where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.report import Metric
from evaluation.samples import Sample
from evaluation.significance.verdicts import Figure, judge
from flows.night.outcome import CellOutcome, NightResult
from flows.night.regressions import compare
from flows.night.summary import summary
from infra.results.rows import NightFigureRow
from tasks.stages.pairs import Reports
from tests.flows.recorded_runs import Evaluation, Records


def answers(shift: int, count: int = 400) -> Evaluation:
    """The model of a night: of the hard items it has `shift` more right; its error is as if items were alone."""
    hard = np.random.default_rng(0).random(count) < 0.6
    right = hard | (np.cumsum(~hard) <= shift)
    samples = [Sample("piqa", item, f"i{item}", {"acc": float(one)}) for item, one in enumerate(right)]
    return Evaluation(samples)


class Nights:
    """Two nights of one cell."""

    def __init__(self, folder: Path) -> None:
        self.records = Records(folder)
        self.runs: list[str] = []

    def night(self, *evaluations: Evaluation) -> CellOutcome:
        key = self.records.add("cell", {"dense": evaluations}, version=len(self.runs))
        self.runs.append(key)
        rows = [row.model_copy(update={"stderr": 0.024}) for row in self.records.results.metrics(key)]
        return CellOutcome(name="cell", run_key=key, seconds=1.0, metrics=tuple(rows))

    def compare(self, cell: CellOutcome, before: tuple[NightFigureRow, ...] = ()) -> tuple[NightFigureRow, ...]:
        return compare("night", [cell], before, Reports(self.records.store), alpha=0.05, tolerance=0.1)

    def forget_samples(self, run: int) -> None:
        ref = self.records.report(self.runs[run], "dense", "zero_shot")
        with self.records.store.trash() as trash:
            assert self.records.store.discard(ref, trash)


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    return Nights(tmp_path / "home")


def test_a_small_loss_is_found_on_the_same_items_only(nights: Nights) -> None:
    first = nights.compare(nights.night(answers(12)))
    cell = nights.night(answers(0))
    (row,) = nights.compare(cell, first)
    assert (row.test, row.verdict) == ("mcnemar", "worse")
    assert row.p_value == pytest.approx(2 * 0.5**12)
    nights.forget_samples(0)
    (row,) = nights.compare(cell, first)
    assert (row.test, row.verdict) == ("z", "noise")
    assert row.p_value is not None
    assert row.p_value > 0.1


def test_few_items_and_other_items_are_left_to_the_errors(nights: Nights) -> None:
    first = nights.compare(nights.night(answers(8, count=19)))
    (row,) = nights.compare(nights.night(answers(0, count=19)), first)
    assert row.test == "z"
    (row,) = nights.compare(nights.night(answers(0)), first)
    assert row.test == "z"


def test_samples_that_are_not_those_of_the_figure_are_not_used(nights: Nights) -> None:
    first = nights.compare(nights.night(answers(12)))
    told = tuple(row.model_copy(update={"value": row.value + 0.01}) for row in first)
    (row,) = nights.compare(nights.night(answers(0)), told)
    assert row.test == "z"


def test_a_stage_that_was_made_again_has_no_samples_of_before(nights: Nights) -> None:
    cell = nights.night(answers(0))
    told = tuple(row.model_copy(update={"value": row.value + 0.01}) for row in nights.compare(cell))
    (row,) = nights.compare(cell, told)
    assert row.test == "z"


def test_what_is_not_tested_names_no_test(nights: Nights) -> None:
    count = Metric(task="piqa", metric="count", value=3, higher_is_better=True)
    cell = nights.night(replace(answers(0), more=(count,)))
    first = nights.compare(cell)
    assert {row.test for row in first} == {None}
    assert {row.test for row in nights.compare(cell, first)} == {None}


def test_the_summary_says_which_tests(nights: Nights) -> None:
    first = nights.compare(nights.night(answers(12)))
    cell = nights.night(answers(0))
    figures = nights.compare(cell, first)
    result = NightResult(
        night_id="night",
        name="small",
        previous_night_id="before",
        cells=(cell,),
        figures=figures,
        gates=(),
        seconds=1.0,
    )
    text = summary(result, alpha=0.05, tolerance=0.1, pages={})
    assert "Tests: 1 paired on the same items (McNemar's exact test" in text
    assert "0 of fewer items or without samples by a two-sided z test" in text


def test_a_paired_p_value_takes_the_place_of_the_z_test() -> None:
    pairs = [(Figure(0.5, 0.1, True), Figure(0.6, 0.1, True))] * 2
    first, second = judge(pairs, paired=[0.001, None])
    assert (first.p_value, first.verdict) == (0.001, "worse")
    assert second.verdict == "noise"
    assert second.p_value == pytest.approx(0.48, abs=0.01)
