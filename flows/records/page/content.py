"""From the results store to the content of a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flows.errors import SpecError
from flows.records.lookup import pick_run, recorded_runs
from flows.records.page.checkpoints import Checkpoint, Way, read_checkpoints, read_plans, read_ways
from flows.records.page.columns import Figures, own_columns, read_figures
from flows.records.page.encode import (
    checkpoint_data,
    column_data,
    moment,
    night_data,
    plan_data,
    run_data,
    verdict_data,
    way_data,
)
from flows.records.page.nights import Night
from flows.records.page.significance import ALPHA, read_verdicts
from flows.records.report.protocol import column_lines
from flows.records.tables import in_one_line, warnings_of
from infra.artifacts.store import ArtifactStore
from infra.provenance import versions
from infra.results.rows import MetricRow, RunRow
from infra.results.store import ResultsStore

#: as in a configuration by path
_CALIBRATION = ".calibration."


@dataclass(frozen=True)
class Page:
    """What is written into a file. data: for the script. protocol: how the figures were taken, a line each.

    lines, good: of a night, what got worse, failed, is new, and whether all is well; notes: what was left out.
    """

    title: str
    lines: tuple[str, ...]
    good: bool
    about: str
    protocol: tuple[str, ...]
    notes: tuple[str, ...]
    data: Mapping[str, Any]


def build_page(
    results: ResultsStore,
    store: ArtifactStore,
    *,
    tracking_uri: str,
    runs: Sequence[str] = (),
    night: Night | None = None,
) -> Page:
    """The page of the newest run of every spec; or of these runs, by name or key, and those of the night's cells.

    Raises SpecError for a run that is not there, and if nothing was recorded.
    """
    chosen = _runs(results, runs, night)
    keys = [run.run_key for run in chosen]
    checkpoints = read_checkpoints(results, keys)
    if not checkpoints:
        names = ", ".join(dict.fromkeys(run.name for run in chosen))
        raise SpecError(f"{names or 'the night'} made no checkpoint that was recorded; give another run or night")
    figures = read_figures(results, keys, checkpoints)
    ways = read_ways(results, keys)
    plans = read_plans(results, keys, ways)
    verdicts = read_verdicts(results, store, keys, checkpoints, figures)
    own = own_columns(checkpoints, figures)
    data = {
        "runs": run_data(chosen, tracking_uri),
        "checkpoints": checkpoint_data(checkpoints, keys),
        "folder": (store.root / "checkpoint").absolute().as_uri(),
        "columns": [column_data(column, len(checkpoints)) for column in (*own, *figures.columns)],
        "ways": way_data(checkpoints, ways),
        "plans": None if plans is None else plan_data(checkpoints, plans),
        "alpha": ALPHA,
        "verdicts": None if verdicts is None else [verdict_data(each, len(own)) for each in verdicts],
        "night": None if night is None else night_data(night),
    }
    called = {run.name for run in chosen}
    return Page(
        title=f"Night {night.row.name}" if night else f"Run {called.pop()}" if len(called) == 1 else "Checkpoints",
        lines=tuple(night.lines) if night else (),
        good=night is None or night.good,
        about=_about(checkpoints, chosen, night),
        protocol=tuple(_protocol(results, keys, figures, ways.values())),
        notes=tuple(_left_out(figures, plans is None, verdicts is None)),
        data=data,
    )


def _runs(results: ResultsStore, names: Sequence[str], night: Night | None) -> list[RunRow]:
    """Newest first."""
    every = recorded_runs(results)
    if not every:
        raise SpecError(f"there are no results in {results.path} yet; run a spec first: slimline run demo")
    wanted = {pick_run(every, name).run_key for name in names}
    if night is not None:
        wanted |= {cell.run_key for cell in results.night_cells(night.row.night_id) if cell.run_key is not None}
    elif not names:
        wanted = {key for (key,) in results.select("SELECT run_key FROM newest_runs").rows}
    return [run for run in reversed(every) if run.run_key in wanted]


def _about(checkpoints: Sequence[Checkpoint], runs: Sequence[RunRow], night: Night | None) -> str:
    newest = max(run.finished_at for run in runs)
    parts = [
        f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) != 1)} of {len(runs)} run{'s' * (len(runs) != 1)}",
        f"the newest of {moment(newest)}",
        f"written {moment(datetime.now(UTC))} by slimline {versions().get('slimline', '')}",
    ]
    if night is not None:
        parts.insert(0, f"{night.row.night_id}: {'good' if night.good else 'not good'}")
    return "; ".join(parts)


def _protocol(results: ResultsStore, keys: Sequence[str], figures: Figures, ways: Iterable[Way]) -> Iterable[str]:
    options = [way.options for way in ways]
    for model in dict.fromkeys(_one_line(each, "model.") for each in options):
        yield f"model: {model}"
    calibrations = {
        _one_line(each, path[: path.index(_CALIBRATION)] + _CALIBRATION)
        for each in options
        for path in each
        if _CALIBRATION in path
    }
    yield from (f"calibration: {each}" for each in sorted(calibrations))
    yield from column_lines({column.heading: [column.example] for column in figures.columns if column.example})
    names = list(MetricRow.model_fields)
    leaks = results.select(
        f"SELECT {', '.join(names)} FROM metrics WHERE list_contains(?, run_key) AND protocol LIKE '%\"leaks\"%' "
        "QUALIFY row_number() OVER (PARTITION BY checkpoint, protocol ORDER BY rowid) = 1 ORDER BY rowid",
        (list(keys),),
    )
    yield from warnings_of(MetricRow.model_validate(dict(zip(names, row, strict=True))) for row in leaks.rows)


def _one_line(options: Mapping[str, Any], start: str) -> str:
    return in_one_line({path.removeprefix(start): value for path, value in options.items() if path.startswith(start)})


def _left_out(figures: Figures, no_plans: bool, no_verdicts: bool) -> Iterable[str]:
    left_out = [
        name
        for name, gone in (
            ("figures that are not in the table", not figures.complete),
            ("layers kept", no_plans),
            ("significance", no_verdicts),
        )
        if gone
    ]
    if left_out:
        yield f"Left out of a page this large: {', '.join(left_out)}. A page of some runs (--run) or a night has them."
