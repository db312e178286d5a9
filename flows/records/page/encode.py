"""The parts of a page's content as plain data, column by column: what the scripts read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from flows.records.page.checkpoints import Checkpoint, Plan, Way
from flows.records.page.columns import Column
from flows.records.page.nights import Night, figure_name
from flows.records.page.significance import Verdicts
from flows.records.tables import in_one_line
from infra.results.rows import RunRow


def run_data(runs: Sequence[RunRow], tracking_uri: str) -> dict[str, Any]:
    """The runs, in this order."""
    return {
        "key": [run.run_key for run in runs],
        "name": [run.name for run in runs],
        "status": [run.status for run in runs],
        "finished": [moment(run.finished_at) for run in runs],
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


def checkpoint_data(checkpoints: Sequence[Checkpoint], keys: Sequence[str]) -> dict[str, Any]:
    """What the checkpoints are; runs by their number in `keys`."""
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


def column_data(column: Column, count: int) -> dict[str, Any]:
    """A value (null where there is none) and a text for each of `count` checkpoints."""
    return {
        "heading": column.heading,
        "name": column.name,
        "better": column.better,
        "board": column.board,
        "values": [_number(column.values.get(place)) for place in range(count)],
        "texts": [column.texts.get(place, "") for place in range(count)],
    }


def way_data(checkpoints: Sequence[Checkpoint], ways: Mapping[str, Way]) -> dict[str, Any]:
    """How the checkpoints were made: the place of the source, -1 for none; options by path."""
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


def plan_data(checkpoints: Sequence[Checkpoint], plans: Mapping[str, Plan]) -> list[Any]:
    """For each checkpoint [kept heads, of how many, kept channels, of how many] or null, a list over layers each."""
    return [
        [*_split(plans[each.key].heads), *_split(plans[each.key].channels)] if each.key in plans else None
        for each in checkpoints
    ]


def _split(half: Sequence[tuple[int, int] | None]) -> tuple[list[int | None], list[int | None]]:
    return [each and each[0] for each in half], [each and each[1] for each in half]


def verdict_data(verdicts: Verdicts, first: int) -> list[Any]:
    """[checkpoint, reference, [[column, difference, low, high, p, verdict, items, lost, gained], ...], problems,
    recorded]; `first`: the column of the first figure."""
    rows = [
        [first + number, *(_short(value) for value in (row.difference, row.low, row.high, row.p_value)), verdict,
         row.num_items, row.flips_lost, row.flips_gained]
        for number, row, verdict in verdicts.rows
    ]  # fmt: skip
    return [verdicts.checkpoint, verdicts.reference, rows, list(verdicts.problems), verdicts.recorded]


def night_data(night: Night) -> dict[str, Any]:
    """A night's changes as texts, and its history: points name their figure and night by number."""
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
        "nights": [[key, moment(started)] for key, started in nights],
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


def moment(when: datetime) -> str:
    """For people."""
    return f"{when:%Y-%m-%d %H:%M} UTC"


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
