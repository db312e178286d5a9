"""The content of a page as plain data, column by column: what flows/records/page/*.js reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from flows.errors import SpecError
from flows.records.lookup import pick_run, recorded_runs
from flows.records.page.checkpoints import Checkpoint, Plan, Way, read_checkpoints, read_plans, read_ways
from flows.records.page.columns import Column, Figures, own_columns, read_figures
from flows.records.page.nights import Night, figure_name
from flows.records.page.significance import ALPHA, Verdicts, read_verdicts
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
        "runs": _run_data(chosen, tracking_uri),
        "checkpoints": _checkpoint_data(checkpoints, keys),
        "folder": (store.root / "checkpoint").as_uri(),
        "columns": [_column_data(column, len(checkpoints)) for column in (*own, *figures.columns)],
        "ways": _way_data(checkpoints, ways),
        "plans": None if plans is None else _plan_data(checkpoints, plans),
        "alpha": ALPHA,
        "verdicts": None if verdicts is None else [_verdict_data(each, len(own)) for each in verdicts],
        "night": None if night is None else _night_data(night),
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


def _run_data(runs: Sequence[RunRow], tracking_uri: str) -> dict[str, Any]:
    return {
        "key": [run.run_key for run in runs],
        "name": [run.name for run in runs],
        "status": [run.status for run in runs],
        "finished": [_moment(run.finished_at) for run in runs],
        "message": [run.message for run in runs],
        "mlflow": [run_url(tracking_uri, run.mlflow_run_id) for run in runs],
    }


def run_url(tracking_uri: str, run_id: str | None) -> str | None:
    """The page of an MLflow run, without user and password; None if no server has it."""
    parts = urlsplit(tracking_uri)
    if run_id is None or parts.scheme not in ("http", "https"):
        return None
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/", "", f"/runs/{run_id}"))


def _checkpoint_data(checkpoints: Sequence[Checkpoint], keys: Sequence[str]) -> dict[str, Any]:
    number = {key: place for place, key in enumerate(keys)}
    return {
        "key": [each.key for each in checkpoints],
        "name": [each.name for each in checkpoints],
        "run": [number[each.run_key] for each in checkpoints],
        "runs": [[number[key] for key in each.runs] for each in checkpoints],
        **{
            field: _coded([getattr(each, field) for each in checkpoints])
            for field in ("spec", "model", "method", "recovery", "variant")
        },
    }


def _column_data(column: Column, count: int) -> dict[str, Any]:
    return {
        "heading": column.heading,
        "name": column.name,
        "better": column.better,
        "board": column.board,
        "values": [_number(column.values.get(place)) for place in range(count)],
        "texts": [column.texts.get(place, "") for place in range(count)],
    }


def _way_data(checkpoints: Sequence[Checkpoint], ways: Mapping[str, Way]) -> dict[str, Any]:
    places = {each.key: place for place, each in enumerate(checkpoints)}
    made = [ways.get(each.key) for each in checkpoints]
    paths = dict.fromkeys(path for way in made if way for path in way.options)
    return {
        "source": [places.get(way.source_key or "", -1) if way else -1 for way in made],
        "action": _coded([way.action if way else None for way in made]),
        "plugin": _coded([way.plugin if way else None for way in made]),
        "seconds": [way.seconds and round(way.seconds, 3) if way else None for way in made],
        "total": [way.total_seconds and round(way.total_seconds, 3) if way else None for way in made],
        "options": {path: _coded([_option(way, path) for way in made]) for path in paths},
    }


def _option(way: Way | None, path: str) -> str | None:
    value = way.options.get(path) if way else None
    if value is None or isinstance(value, str):
        return value
    return in_one_line(value) if isinstance(value, dict) else json.dumps(value)


def _plan_data(checkpoints: Sequence[Checkpoint], plans: Mapping[str, Plan]) -> list[Any]:
    """For each checkpoint [kept heads, of how many, kept channels, of how many] or null, a list over layers each."""
    return [
        [*_split(plans[each.key].heads), *_split(plans[each.key].channels)] if each.key in plans else None
        for each in checkpoints
    ]


def _split(half: Sequence[tuple[int, int] | None]) -> tuple[list[int | None], list[int | None]]:
    return [each and each[0] for each in half], [each and each[1] for each in half]


def _verdict_data(verdicts: Verdicts, first: int) -> list[Any]:
    """[checkpoint, reference, [[column, difference, low, high, p, verdict, items, lost, gained], ...], problems,
    recorded]; `first`: the column of the first figure."""
    rows = [
        [first + number, *(_short(value) for value in (row.difference, row.low, row.high, row.p_value)), verdict,
         row.num_items, row.flips_lost, row.flips_gained]
        for number, row, verdict in verdicts.rows
    ]  # fmt: skip
    return [verdicts.checkpoint, verdicts.reference, rows, list(verdicts.problems), verdicts.recorded]


def _night_data(night: Night) -> dict[str, Any]:
    changes = [
        [row.verdict, row.cell, row.checkpoint, figure_name(row), _value(row.before_value, row.before_stderr),
         "-" if row.verdict == "gone" else _value(row.value, row.stderr), _p(row.p_value), row.gate]
        for row in night.changes
    ]  # fmt: skip
    nights = list(dict.fromkeys((point.night_id, point.started_at) for point in night.history))
    nights.sort(key=lambda each: each[1])
    places = list(dict.fromkeys(point.place for point in night.history))
    number, of_place = {key: n for n, (key, _) in enumerate(nights)}, {place: n for n, place in enumerate(places)}
    return {
        "id": night.row.night_id,
        "changes": changes,
        "nights": [[key, _moment(started)] for key, started in nights],
        "figures": [" · ".join(place) for place in places],
        "points": [
            [
                of_place[each.place],
                number[each.night_id],
                _number(each.value),
                _value(each.value, each.stderr),
                each.verdict,
            ]
            for each in night.history
        ],
    }


def _about(checkpoints: Sequence[Checkpoint], runs: Sequence[RunRow], night: Night | None) -> str:
    newest = max(run.finished_at for run in runs)
    parts = [
        f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) != 1)} of {len(runs)} run{'s' * (len(runs) != 1)}",
        f"the newest of {_moment(newest)}",
        f"written {_moment(datetime.now(UTC))} by slimline {versions().get('slimline', '')}",
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
        f"SELECT DISTINCT ON (checkpoint, protocol) {', '.join(names)} FROM metrics WHERE list_contains(?, run_key) "
        "AND protocol LIKE '%\"leaks\"%'",
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


def _coded(values: Sequence[str | None]) -> dict[str, Any]:
    """Words, and for each value the number of its word, -1 for none."""
    words = {word: number for number, word in enumerate(dict.fromkeys(value for value in values if value is not None))}
    return {"words": list(words), "codes": [-1 if value is None else words[value] for value in values]}


def _number(value: float | None) -> float | str | None:
    """Infinity and NaN as the words that JavaScript's Number() reads."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"


def _short(value: float) -> float | str | None:
    """As `slimline compare` prints it."""
    return _number(float(f"{value:.3g}"))


def _value(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if stderr is None else f"{value:.4g} ± {stderr:.2g}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
