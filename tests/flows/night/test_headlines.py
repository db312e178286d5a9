"""The three lines about a night: what got worse, what failed, what is new."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

from flows.night.headlines import Headlines, headlines, headlines_of_record, headlines_of_result
from flows.night.outcome import CellOutcome, GateOutcome, NightResult
from infra.results.rows import NightCellRow, NightFigureRow, NightRow

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
LAST = "night-small-1"


def figure(verdict: str, value: float = 2.0, before: float | None = 1.0, **fields: Any) -> NightFigureRow:
    known: dict[str, Any] = {
        "night_id": "night-small-2",
        "cell": "tiny-slimgpt-20",
        "checkpoint": "slimgpt-20",
        "suite": "perplexity",
        "task": "wikitext2",
        "metric": "ppl@128",
        "higher_is_better": False,
        "stage_key": f"evaluate-{verdict}-{fields.get('task', '')}-{fields.get('cell', '')}",
        "before_value": None if verdict == "first" else before,
    }
    return NightFigureRow(**known | {"value": value, "verdict": verdict} | fields)


def test_a_night_in_which_nothing_happened_says_so() -> None:
    assert headlines([figure("same"), figure("noise")], {}, (), LAST) == Headlines(
        f"Worse: nothing, of 2 figures compared with {LAST}", "Failed: nothing", "New: nothing"
    )


def test_the_first_night_has_nothing_to_compare_with() -> None:
    lines = headlines([figure("first"), figure("first", task="c4")], {}, (), None)
    assert lines.worse == "Worse: nothing to compare with, there is no good night before this one"
    assert lines.new == "New: all 2 figures"
    assert headlines([], {"a": "no"}, (), None).new == "New: nothing was measured"


def test_the_greatest_change_stands_first_and_the_rest_is_counted() -> None:
    rows = [figure("worse", value, task=f"t{value:g}") for value in (2.0, 9.0, 3.0, 4.0, math.nan)]
    line = headlines(rows, {}, (), LAST).worse
    assert line.startswith("Worse: 5 of 5 figures: tiny-slimgpt-20 slimgpt-20 perplexity/tnan/ppl@128 nan (before 1), ")
    assert line.index("/t9/") < line.index("/t4/")
    assert "/t3/" not in line
    assert line.endswith(" and 2 more")


def test_infinite_figures_are_said() -> None:
    line = headlines([figure("worse", math.inf), figure("worse", 1.0, 0.0, task="zero")], {}, (), LAST).worse
    assert "inf (before 1)" in line
    assert "1 (before 0)" in line


def test_what_cells_share_counts_once() -> None:
    shared = [figure("worse", cell=cell, stage_key="evaluate-shared") for cell in ("a", "b")]
    assert headlines(shared, {}, (), LAST).worse.startswith("Worse: 1 of 1 figure: a slimgpt-20 ")


def test_failed_cells_and_gates_are_told_with_their_reasons_in_one_line() -> None:
    broken = figure("same", gate="failed", message="tiny = 2, more than 1")
    line = headlines([broken, broken], {"Zelle ä/b": "it\n  <script>broke" + "x" * 500}, ["mmlu/*"], LAST).failed
    assert line.startswith("Failed: 1 cell: Zelle ä/b (it <script>brokexxx")
    assert "..." in line
    assert line.count("tiny = 2, more than 1") == 1
    assert line.endswith("gate mmlu/*: it matches no figure, so it guards nothing")
    assert "\n" not in line
    assert len(line) < 400


def test_new_cells_new_figures_better_and_gone() -> None:
    rows = [
        figure("same"),
        figure("first", task="piqa"),
        figure("first", cell="other-cell", task="c4"),
        figure("better", 0.5, task="better"),
        figure("gone", task="gone"),
    ]
    assert headlines(rows, {}, (), LAST).new == (
        "New: 1 cell: other-cell; 1 figure for the first time: tiny-slimgpt-20 slimgpt-20 perplexity/piqa/ppl@128; "
        "1 better: tiny-slimgpt-20 slimgpt-20 perplexity/better/ppl@128 0.5 (before 1); "
        "1 gone: tiny-slimgpt-20 slimgpt-20 perplexity/gone/ppl@128"
    )


def test_the_record_of_a_night_says_the_same_as_its_result() -> None:
    figures = (figure("worse"), figure("first", gate="failed", message="x = 1, less than 2; and more"))
    gates = (
        GateOutcome(gate="perplexity/* at least 2", num_figures=1, problems=("x = 1, less than 2",)),
        GateOutcome(gate="mmlu/* at least 0.5", num_figures=0),
        GateOutcome(gate="longbench/*", num_figures=0),
    )
    cells = (
        CellOutcome(name="good", run_key="run-1", seconds=1.0),
        CellOutcome(name="bad", run_key=None, seconds=1.0, message="no gate; gate closed"),
    )
    result = NightResult(
        night_id="night-small-2", name="small", previous_night_id=LAST, cells=cells, figures=figures, gates=gates,
        seconds=2.0,
    )  # fmt: skip
    night = NightRow(
        night_id=result.night_id, name="small", spec="{}", status="failed", gates_passed=False, started_at=NOON,
        finished_at=NOON + timedelta(hours=1), slimline_version="0", previous_night_id=LAST, num_stages=1, num_run=1,
        num_cached=0, num_failed=0, message=result.message,
    )  # fmt: skip
    rows = [
        NightCellRow(
            night_id=result.night_id, cell=cell.name, status=cell.status, seconds=1.0, num_run=0, num_cached=0,
            num_failed=0, num_skipped=0, message=cell.message,
        )
        for cell in cells
    ]  # fmt: skip
    lines = headlines_of_result(result)
    assert headlines_of_record(night, rows, figures) == lines
    assert lines.failed == (
        "Failed: 1 cell: bad (no gate; gate closed); gates: x = 1, less than 2; and more, "
        "gate mmlu/* at least 0.5: it matches no figure, so it guards nothing, "
        "gate longbench/*: it matches no figure, so it guards nothing"
    )
