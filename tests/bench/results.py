"""Part `results`: how long the questions of a morning take in a large results store."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from statistics import median

from flows.records.leaderboard import entries
from flows.records.page.content import build_page
from flows.records.page.document import page_html
from infra.artifacts.store import ArtifactStore
from infra.results.files import Record
from infra.results.lineage import Made, checkpoint_rows
from infra.results.rows import NIGHT, RUN, MetricRow, NightFigureRow, NightRow, RunRow
from infra.results.store import ResultsStore
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol

_CHECKPOINTS = 10
_RUNS_PER_NIGHT = 10
_FIGURES_PER_NIGHT = 100
_REPEATS = 5
_START = datetime(2026, 1, 1, tzinfo=UTC)
_PROFILE = ("num_parameters", "num_decoder_parameters", "latency_ms_p50", "decode_ms_per_token_p50", "peak_memory_gib")
_PROTOCOL = '{"dataset": "Salesforce/wikitext", "split": "test", "bos": "none", "versions": {"torch": "2.13.0"}}'


def run(materials: Materials, options: Options) -> Result:
    """Milliseconds of the leaderboard, a figure's history and one run, each by a process that opens the store anew; and
    the page of all checkpoints."""
    path = options.scratch / "results" / "results.duckdb"
    started = time.monotonic()
    fill(ResultsStore(path), options.results_runs, options.results_metrics)
    written = time.monotonic()
    ResultsStore(path).select("SELECT count(*) FROM runs")
    indexed = time.monotonic()
    history = "SELECT * FROM history WHERE night = 'night' AND cell = 'cell 3' AND checkpoint = 'slimgpt-10'"
    page = options.scratch / "results" / "page.html"
    asked = time.monotonic()
    content = build_page(ResultsStore(path), ArtifactStore(options.scratch / "store"), tracking_uri="")
    page.write_text(page_html(content), encoding="utf-8")
    page_seconds = time.monotonic() - asked
    one = f"SELECT * FROM metrics WHERE run_key = '{_key(options.results_runs // 2)}'"
    figures = Figures(
        results_runs=options.results_runs,
        results_metrics_per_run=options.results_metrics,
        results_write_seconds=written - started,
        results_index_seconds=indexed - written,
        results_index_mib=path.stat().st_size / 2**20,
        results_leaderboard_ms=_milliseconds(lambda: entries(ResultsStore(path))),
        results_leaderboard_all_ms=_milliseconds(lambda: ResultsStore(path).select("SELECT * FROM leaderboard")),
        results_front_ms=_milliseconds(lambda: ResultsStore(path).select("SELECT * FROM pareto")),
        results_history_ms=_milliseconds(lambda: ResultsStore(path).select(history)),
        results_page_checkpoints=len(content.data["checkpoints"]["key"]),
        results_page_seconds=page_seconds,
        results_page_mib=page.stat().st_size / 2**20,
        results_run_ms=_milliseconds(lambda: ResultsStore(path).select(one)),
    )
    details = (
        f"{options.results_runs} specs with a run each, {_CHECKPOINTS} checkpoints and {options.results_metrics} "
        f"metrics a run; a night of {_FIGURES_PER_NIGHT} figures for every {_RUNS_PER_NIGHT} runs",
        f"medians of {_REPEATS}, from opening the store to the last row",
    )
    return Result("results", protocol(options, *details), figures)


def fill(store: ResultsStore, runs: int, metrics: int) -> None:
    """Write runs with so many metrics each, and a night for every ten of them; random figures, always the same."""
    generator = random.Random(0)
    for index in range(runs):
        started = _START + timedelta(minutes=index)
        run = RunRow(
            run_key=_key(index), name=f"spec {index}", spec='{"model": {"id": "tiny"}}', status="completed",
            started_at=started, finished_at=started + timedelta(minutes=1), slimline_version="0",
        )  # fmt: skip
        made = [
            Made(f"slimgpt-{10 * n}", "dense", "prune", "slimgpt", {"sparsity": n / 10}, n / 10)
            for n in range(1, _CHECKPOINTS)
        ]
        keys = {name: f"prune-{name}-{index:016x}" for name in ("dense", *(each.name for each in made))}
        rows = {
            "runs": (run,),
            "metrics": tuple(_metrics(_key(index), keys, metrics, generator)),
            "checkpoints": checkpoint_rows(_key(index), {"id": "tiny"}, made, keys),
        }
        store.files.write(Record(RUN, rows))
        if index % _RUNS_PER_NIGHT == 0:
            _night(store, index, generator)


def _key(index: int) -> str:
    return f"run-spec-v1-{index:016x}"


def _metrics(run_key: str, keys: dict[str, str], count: int, generator: random.Random) -> Iterator[MetricRow]:
    for index in range(count):
        checkpoint, number = list(keys)[index % len(keys)], index // len(keys)
        names = [
            *(("profile", "profile", metric) for metric in _PROFILE),
            *(("perplexity", "wikitext-2-raw-v1", f"ppl@{2**power}") for power in range(7, 12)),
        ]
        suite, task, metric = names[number] if number < len(names) else ("zero_shot", f"task {number}", "acc")
        yield MetricRow(
            run_key=run_key, checkpoint=checkpoint, checkpoint_key=keys[checkpoint], stage_key=f"evaluate-{index}",
            suite=suite, task=task, metric=metric, value=generator.uniform(0.1, 100), stderr=0.1, num_fewshot=0,
            protocol=_PROTOCOL, higher_is_better=suite == "zero_shot",
        )  # fmt: skip


def _night(store: ResultsStore, index: int, generator: random.Random) -> None:
    night_id, started = f"night-{index:08d}", _START + timedelta(days=index)
    night = NightRow(
        night_id=night_id, name="night", spec="{}", status="completed", gates_passed=True, started_at=started,
        finished_at=started, slimline_version="0", num_stages=1, num_run=1, num_cached=0, num_failed=0,
    )  # fmt: skip
    figures = tuple(
        NightFigureRow(
            night_id=night_id, cell=f"cell {number % 10}", checkpoint="slimgpt-10", suite="perplexity", task="text",
            metric=f"ppl@{number}", value=generator.uniform(1, 100), higher_is_better=False, stage_key="s",
            verdict="same",
        )
        for number in range(_FIGURES_PER_NIGHT)
    )  # fmt: skip
    store.files.write(Record(NIGHT, {"nights": (night,), "night_figures": figures}))


def _milliseconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - started))
    return median(taken)
