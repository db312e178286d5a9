"""The leaderboard of the terminal: what can be compared in one table, each checkpoint once, the best marked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.errors import SpecError
from flows.records.leaderboard import leaderboard
from infra.results.files import Record
from infra.results.rows import RUN, CheckpointRow, MetricRow, RunRow
from infra.results.store import ResultsStore
from tests.flows.recorded_runs import NOON

#: (suite, task, metric), value, protocol
Figures = Mapping[tuple[str, str, str], float]

PPL = ("perplexity", "wikitext2", "ppl@128")
ACC = ("zero_shot", "piqa", "acc")
RATIO = ("profile", "profile", "latency_ratio")
PEAK = ("profile", "profile", "peak_memory_gib")


class Board:
    """A store into which runs are recorded; the later, the newer."""

    def __init__(self, folder: Path) -> None:
        self.store = ResultsStore(folder / "results.duckdb")
        self.runs = 0
        self._shown: dict[int, str] = {}

    def add(
        self,
        spec: str,
        checkpoints: Mapping[str, Figures],
        *,
        model: str = "owner/model",
        protocol: Mapping[str, Any] | None = None,
        status: str = "completed",
    ) -> None:
        self.runs += 1
        key = f"run-{self.runs}"
        run = RunRow(
            run_key=key, name=spec, spec="{}", status=status, started_at=NOON,
            finished_at=NOON + timedelta(minutes=self.runs), slimline_version="0",
        )  # fmt: skip
        made = [
            CheckpointRow(
                run_key=key,
                checkpoint=name,
                checkpoint_key=f"{model}-{name}",
                model=model,
                action="import" if name == "dense" else "prune",
                total_sparsity={"20": 0.2, "50": 0.5}.get(name[-2:]),
                config="{}",
                num_parameters=1_000_000,
            )
            for name in checkpoints
        ]
        metrics = [
            MetricRow(
                run_key=key, checkpoint=name, checkpoint_key=f"{model}-{name}", stage_key=f"{key}-{name}", suite=suite,
                task=task, metric=metric, value=value, num_fewshot=0 if metric == "acc" else None,
                higher_is_better=metric == "acc", protocol=json.dumps(protocol or {"bos": True}),
            )
            for name, figures in checkpoints.items()
            for (suite, task, metric), value in figures.items()
        ]  # fmt: skip
        # the index takes in all files at once, when it is asked
        rows = dict.fromkeys(RUN.tables, ()) | {"runs": (run,), "metrics": metrics, "checkpoints": made}
        self.store.files.write(Record(RUN, rows))

    def show(self, **options: Any) -> str:
        if options:
            return leaderboard(self.store, **options)
        if self.runs not in self._shown:
            self._shown[self.runs] = leaderboard(self.store)
        return self._shown[self.runs]

    def line(self, name: str) -> str:
        """The only line that begins with a checkpoint's name."""
        (line,) = [line for line in self.show().splitlines() if line.startswith(f"{name} ")]
        return line


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_an_empty_store_is_said_to_be_empty(board: Board) -> None:
    with pytest.raises(SpecError, match=r"no results in .* yet; run a spec first: slimline run demo"):
        board.show()


def test_the_best_of_each_budget_is_marked_and_dense_is_not(board: Board) -> None:
    board.add("a", {"dense": {PPL: 5.0, ACC: 0.9}, "a-20": {PPL: 7.0, ACC: 0.6}, "a-50": {PPL: 20.0}})
    board.add("b", {"dense": {PPL: 5.0, ACC: 0.9}, "b-20": {PPL: 6.0, ACC: 0.5}, "b-50": {PPL: 30.0}})
    assert "6.00*" in board.line("b-20")
    assert "0.600*" in board.line("a-20")
    assert "20.00*" in board.line("a-50")
    assert board.show().split("\n\n* best")[0].count("*") == 3
    assert "5.00" in board.line("dense"), "a checkpoint of two specs stands there once"
    order = [line.split()[0] for line in board.show().splitlines()[2:7]]
    assert order == ["dense", "b-20", "a-20", "a-50", "b-50"]


def test_other_protocols_models_and_texts_are_other_tables(board: Board) -> None:
    other = ("perplexity", "c4", "ppl@128")
    board.add("a", {"a-20": {PPL: 7.0}})
    board.add("bos", {"b-20": {PPL: 6.0}}, protocol={"bos": False})
    board.add("c4", {"c-20": {other: 5.0}})
    board.add("other", {"d-20": {PPL: 4.0}}, model="other/model")
    text = board.show()
    assert text.count("ppl is perplexity/wikitext2/ppl@128") == 3
    assert text.count("ppl is perplexity/c4/ppl@128") == 1
    assert text.count("*") == 1, "nothing can be compared, so only the legend has a star"


def test_figures_of_other_protocols_in_one_table_are_not_compared(board: Board) -> None:
    board.add("a", {"a-20": {PPL: 7.0, ACC: 0.4}})
    board.add("b", {"b-20": {PPL: 6.0, ACC: 0.5, ("zero_shot", "boolq", "acc"): 0.7}})
    assert "0.600" in board.line("b-20")
    assert "0.600*" not in board.line("b-20")


def test_a_checkpoint_has_the_figures_of_all_specs(board: Board) -> None:
    board.add("old", {"a-20": {PPL: 7.0, ACC: 0.4}, "b-20": {PPL: 8.0, ACC: 0.5}})
    board.add("speed", {"a-20": {RATIO: 0.8, PEAK: 1.0}, "b-20": {RATIO: 0.9, PEAK: 1.0}})
    assert board.line("a-20").split() == ["a-20", "old", "20%", "1.00", "7.00*", "0.400", "0.800*", "1.00"]


def test_nan_is_never_best_and_infinity_is_the_worst(board: Board) -> None:
    board.add(
        "a", {"a-20": {PPL: math.nan, ACC: math.nan}, "b-20": {PPL: math.inf, ACC: 0.5}, "c-20": {PPL: 1e9, ACC: 0.4}}
    )
    assert "nan" in board.line("a-20")
    assert "inf " in board.line("b-20")
    assert "0.500*" in board.line("b-20")
    assert "1e+09*" in board.line("c-20")


def test_odd_names_stay_in_their_cells(board: Board) -> None:
    board.add("Läufe/a b <script>\x1b[2J\n" + "x" * 99, {"ä/ö <b>-20": {PPL: 7.0}})
    text = board.show()
    assert "\x1b" not in text
    assert "ä/ö <b>-20  Läufe/a b <script> [2J xxxx" in text
    assert "..." in text


def test_a_narrow_terminal_keeps_what_matters(board: Board) -> None:
    board.add("specification", {name: {PPL: 7.0, ACC: 0.4, RATIO: 0.5, PEAK: 1.0} for name in ("a-20", "b-20")})
    for width in (100, 60, 40):
        lines = board.show(width=width).split("\n\n")[0].splitlines()
        assert max(map(len, lines[1:3])) <= width
        assert "a-20" in lines[2]
        assert "7.00" in lines[2]
        assert lines[-1].startswith("(no room for: ") or width == 100


def test_bold_letters_move_no_column(board: Board) -> None:
    board.add("a", {"a-20": {PPL: 7.0, ACC: 0.4}, "b-20": {PPL: 8.0, ACC: 0.5}})
    shown = board.show(bold=True)
    assert "\x1b[1m7.00*\x1b[0m" in shown
    assert shown.replace("\x1b[1m", "").replace("\x1b[0m", "") == board.show()


def test_a_failed_run_is_told(board: Board) -> None:
    board.add("broken", {"a-20": {PPL: 7.0}}, status="failed")
    assert "broken: in its newest run a stage failed" in board.show()
