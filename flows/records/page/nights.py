"""What a page says of a night: its lines, what changed, the figures night after night."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from infra.results.rows import NightFigureRow, NightRow
from infra.results.store import ResultsStore

#: of each figure, the newest
MOST_NIGHTS = 60
#: a page with more has only figures whose verdict was ever worse or better
MOST_POINTS = 100_000

#: verdicts that are worth a row each, in this order
NOTABLE = ("worse", "gone", "better", "first")


@dataclass(frozen=True)
class Point:
    """A figure of a night."""

    place: tuple[str, str, str]
    """Cell, checkpoint, suite/task/metric."""
    night_id: str
    started_at: datetime
    value: float
    stderr: float | None
    verdict: str
    higher_is_better: bool


@dataclass(frozen=True)
class Night:
    """A recorded night. lines: what got worse, failed, is new. good: whether nothing failed and the gates hold."""

    row: NightRow
    good: bool
    lines: Sequence[str]
    changes: Sequence[NightFigureRow]
    history: Sequence[Point]


def read_night(results: ResultsStore, row: NightRow, lines: Sequence[str]) -> Night:
    """The night, with its figures of other nights of its name."""
    figures = results.night_figures(row.night_id)
    changes = [figure for verdict in NOTABLE for figure in figures if figure.verdict == verdict]
    if row.previous_night_id is None:
        changes = []  # all are the first
    good = row.status == "completed" and row.gates_passed
    return Night(row, good, lines, changes, _history(results, row))


def _history(results: ResultsStore, row: NightRow) -> list[Point]:
    earlier = [each for each in results.nights(row.name) if each.started_at <= row.started_at]
    chosen = [each.night_id for each in earlier[-MOST_NIGHTS:]]
    question = (
        "SELECT cell, checkpoint, suite || '/' || task || '/' || metric, night_id, started_at, value, stderr, verdict, "
        "higher_is_better FROM history WHERE night = ? AND list_contains(?, night_id) AND verdict <> 'gone'"
    )
    ((count,),) = results.select(f"SELECT count(*) FROM ({question})", (row.name, chosen)).rows
    if count > MOST_POINTS:
        question += (
            " QUALIFY bool_or(verdict IN ('worse', 'better')) OVER (PARTITION BY cell, checkpoint, suite, task, metric)"
        )
    points = [
        Point((cell, checkpoint, figure), *rest)
        for cell, checkpoint, figure, *rest in results.select(question, (row.name, chosen)).rows
    ]
    return sorted(points, key=lambda point: (point.place, point.started_at))


def figure_name(row: NightFigureRow) -> str:
    """ "suite/task/metric"."""
    return f"{row.suite}/{row.task}/{row.metric}"
