"""Paired comparisons as tables and as data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from flows.records.compare import ComparedFigure, Comparison
from flows.records.render import csv_table, markdown_table
from flows.records.tables import protocol_lines
from infra.results.rows import PairRow

_COLUMNS = ("suite", "task", "metric", "difference", "95 % interval", "p", "verdict", "items", "lost", "gained")


def render_pairs(comparison: Comparison, form: str) -> str:
    """`form`: "table" (aligned text) and "markdown" for the eye; "json" and "csv" every value of every row."""
    if form == "json":
        return json.dumps([_plain(each) for each in comparison.rows])
    if form == "csv":
        columns = [*PairRow.model_fields, "a", "b", "verdict", "other_versions"]
        return csv_table(columns, [_plain(each) | {"other_versions": _versions(each)} for each in comparison.rows])
    draw = markdown_table if form == "markdown" else _aligned
    return "\n\n".join(draw(head, rows) for head, rows in _tables(comparison.rows))


def notes(comparison: Comparison, alpha: float) -> Iterator[str]:
    """How it was tested, what was measured with other versions, what could not be compared, and what has no samples."""
    tests = len(comparison.rows)
    yield (
        f"verdict: {tests} tests, Holm-corrected at level {alpha:g}; p as of each test alone (McNemar's exact test for "
        "right or wrong, else sign flips), intervals by bootstrap over items; lost: right in the second, wrong in the "
        "first; gained: the other way round"
    )
    yield from _version_lines(comparison.rows)
    for problem in comparison.problems:
        yield f"not compared: {problem}"
    if comparison.without_samples:
        yield f"no samples of their own: {', '.join(comparison.without_samples)}"


def protocol(comparison: Comparison) -> Iterator[str]:
    """How the first run took the figures, as under its own table, each evaluation once."""
    yield f"protocol of {comparison.run.name} ({comparison.run.run_key}):"
    yield from protocol_lines(comparison.measured, json.loads(comparison.run.spec))


def _version_lines(rows: Sequence[ComparedFigure]) -> Iterator[str]:
    """A line for each set of differences, with what it is of unless it is of all."""
    places: dict[str, list[str]] = {}
    for each in rows:
        if each.other_versions:
            places.setdefault(_versions(each), []).append(f"{each.row.suite} of {each.labels[0]} and {each.labels[1]}")
    for text, evaluations in places.items():
        where = "" if len(evaluations) == len(rows) else f" ({', '.join(dict.fromkeys(evaluations))})"
        yield f"measured with other versions: {text}{where}"


def _versions(compared: ComparedFigure) -> str:
    """ "transformers 5.23.0 / 5.24.0", first that of the measured side."""
    return ", ".join(
        f"{library} {mine or 'not recorded'} / {theirs or 'not recorded'}"
        for library, (mine, theirs) in compared.other_versions.items()
    )


def _tables(rows: Sequence[ComparedFigure]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Headings and rows for each two checkpoints."""
    for labels, group in groupby(rows, key=lambda each: each.labels):
        yield [*_COLUMNS[:3], *labels, *_COLUMNS[3:]], [_cells(each) for each in group]


def _cells(compared: ComparedFigure) -> list[str]:
    row = compared.row
    flips = ["" if count is None else str(count) for count in (row.flips_lost, row.flips_gained)]
    figures = [f"{row.value:.4g}", f"{row.reference_value:.4g}", f"{row.difference:+.3g}"]
    interval = f"[{row.low:+.3g}, {row.high:+.3g}]"
    return [row.suite, row.task, row.metric, *figures, interval, f"{row.p_value:.2g}", compared.verdict,
            str(row.num_items), *flips]  # fmt: skip


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # names to the left, figures to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _plain(compared: ComparedFigure) -> dict[str, Any]:
    mine, theirs = compared.labels
    return compared.row.model_dump(mode="json") | {
        "a": mine,
        "b": theirs,
        "verdict": compared.verdict,
        "other_versions": dict(compared.other_versions),
    }
