"""The first three lines about a night: what got worse, what failed, what is new. Plain text, not escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flows.night.outcome import GUARDS_NOTHING, NightResult
from infra.results.rows import NightCellRow, NightFigureRow, NightRow

#: of each kind so many are named, the others counted
_NAMED = 3
#: characters of one reason for which something failed
_REASON = 160


class Headlines(NamedTuple):
    """One line each, "Worse: ...", "Failed: ..." and "New: ..."; a line of which there is nothing to tell says so."""

    worse: str
    failed: str
    new: str


def headlines(
    figures: Iterable[NightFigureRow],
    failed_cells: Mapping[str, str],
    idle_gates: Sequence[str],
    previous_night_id: str | None,
) -> Headlines:
    """The three lines.

    figures: of the night, judged against the last good one, which is previous_night_id. failed_cells: why each failed,
    by name. idle_gates: those that guard no figure, in words.
    """
    rows = list(figures)
    once = distinct(rows)
    return Headlines(
        _worse(once, previous_night_id), _failed(rows, failed_cells, idle_gates), _new(rows, once, previous_night_id)
    )


def headlines_of_result(result: NightResult) -> Headlines:
    """Of a night that has just ended."""
    failed = {cell.name: cell.message or "" for cell in result.failures}
    idle = [gate.gate for gate in result.gates if gate.num_figures == 0]
    return headlines(result.figures, failed, idle, result.previous_night_id)


def headlines_of_record(night: NightRow, cells: Iterable[NightCellRow], figures: Iterable[NightFigureRow]) -> Headlines:
    """The same of a recorded night, from its rows in the results store."""
    failed = {cell.cell: cell.message or "" for cell in cells if cell.status == "failed"}
    idle = re.findall(rf"(?:^|; )gate (.+?): {GUARDS_NOTHING}", night.message or "")
    return headlines(figures, failed, [words.rpartition("; gate ")[2] for words in idle], night.previous_night_id)


def distinct(figures: Iterable[NightFigureRow]) -> list[NightFigureRow]:
    """Cells share stages: a shared figure is counted and shown once, under the first cell that has it."""
    seen: dict[tuple[str, ...], NightFigureRow] = {}
    for row in figures:
        seen.setdefault((row.stage_key, row.task, row.metric, row.verdict, row.before_stage_key or ""), row)
    return list(seen.values())


def place(row: NightFigureRow) -> str:
    """Where a figure belongs: cell, checkpoint, suite/task/metric."""
    return f"{row.cell} {row.checkpoint} {row.suite}/{row.task}/{row.metric}"


def relative_change(row: NightFigureRow) -> float:
    """How far it is from its value before, relative to that; infinite where that has no meaning."""
    if row.before_value is None or math.isnan(row.value) or math.isnan(row.before_value):
        return math.inf
    if row.value == row.before_value:
        return 0.0
    change = abs(row.value - row.before_value) / abs(row.before_value) if row.before_value else math.inf
    return math.inf if math.isnan(change) else change


def _worse(figures: Sequence[NightFigureRow], previous: str | None) -> str:
    if previous is None:
        return "Worse: nothing to compare with, there is no good night before this one"
    compared = sum(row.before_value is not None and row.verdict != "gone" for row in figures)
    worse = _of(figures, "worse")
    if not worse:
        return f"Worse: nothing, of {_count(compared, 'figure')} compared with {previous}"
    return f"Worse: {len(worse)} of {_count(compared, 'figure')}: {_named(map(_changed, worse))}"


def _failed(figures: Sequence[NightFigureRow], cells: Mapping[str, str], idle_gates: Sequence[str]) -> str:
    broken = dict.fromkeys(row.message or place(row) for row in figures if row.gate == "failed")
    gates = [*broken, *(f"gate {words}: {GUARDS_NOTHING}" for words in idle_gates)]
    parts = []
    if cells:
        parts.append(f"{_count(len(cells), 'cell')}: {_named(map(_reason, cells, cells.values()))}")
    if gates:
        parts.append(f"gates: {_named(map(_cut, gates))}")
    return f"Failed: {'; '.join(parts) or 'nothing'}"


def _new(rows: Sequence[NightFigureRow], once: Sequence[NightFigureRow], previous: str | None) -> str:
    first, better, gone = (_of(once, verdict) for verdict in ("first", "better", "gone"))
    if previous is None:
        return f"New: all {_count(len(first), 'figure')}" if first else "New: nothing was measured"
    old_cells = {row.cell for row in rows if row.verdict != "first"}
    cells = dict.fromkeys(row.cell for row in rows if row.cell not in old_cells)
    others = [place(row) for row in first if row.cell in old_cells]
    parts = []
    if cells:
        parts.append(f"{_count(len(cells), 'cell')}: {_named(cells)}")
    if others:
        parts.append(f"{_count(len(others), 'figure')} for the first time: {_named(others)}")
    if better:
        parts.append(f"{len(better)} better: {_named(map(_changed, better))}")
    if gone:
        parts.append(f"{len(gone)} gone: {_named(map(place, gone))}")
    return f"New: {'; '.join(parts) or 'nothing'}"


def _of(figures: Iterable[NightFigureRow], verdict: str) -> list[NightFigureRow]:
    """Those with the verdict, the greatest change first."""
    return sorted((row for row in figures if row.verdict == verdict), key=lambda row: -relative_change(row))


def _changed(row: NightFigureRow) -> str:
    before = "" if row.before_value is None else f" (before {row.before_value:.4g})"
    return f"{place(row)} {row.value:.4g}{before}"


def _named(names: Iterable[str]) -> str:
    every = [" ".join(name.split()) for name in names]
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more


def _reason(cell: str, message: str) -> str:
    return f"{cell} ({_cut(message)})"


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _REASON else f"{plain[: _REASON - 3]}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
