"""Paired comparisons as tables and as data."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from flows.pairing import Compared, Comparison
from infra.result_rows import PairRow

_COLUMNS = ("suite", "task", "metric", "difference", "95 % interval", "p", "verdict", "items", "lost", "gained")


def render_pairs(comparison: Comparison, form: str) -> str:
    """`form`: "table" (aligned text) and "markdown" for the eye; "json" and "csv" every value of every row."""
    if form == "json":
        return json.dumps([_plain(each) for each in comparison.rows])
    if form == "csv":
        return _csv(comparison.rows)
    draw = _markdown if form == "markdown" else _aligned
    return "\n\n".join(draw(list(lines)) for lines in _tables(comparison.rows))


def notes(comparison: Comparison, alpha: float) -> Iterator[str]:
    """How it was tested, what could not be, and what has no samples."""
    tests = len(comparison.rows)
    yield (
        f"verdict: {tests} tests, Holm-corrected at level {alpha:g}; p as of each test alone (McNemar's exact test for "
        "right or wrong, else sign flips), intervals by bootstrap over items; lost: right in the second, wrong in the "
        "first; gained: the other way round"
    )
    for problem in comparison.problems:
        yield f"not compared: {problem}"
    if comparison.without_samples:
        yield f"no samples of their own: {', '.join(comparison.without_samples)}"


def _tables(rows: Sequence[Compared]) -> Iterator[Iterator[list[str]]]:
    for labels, group in groupby(rows, key=lambda each: each.labels):
        yield iter([[*_COLUMNS[:3], *labels, *_COLUMNS[3:]], *(_cells(each) for each in group)])


def _cells(compared: Compared) -> list[str]:
    row = compared.row
    flips = ["" if count is None else str(count) for count in (row.flips_lost, row.flips_gained)]
    figures = [f"{row.value:.4g}", f"{row.reference_value:.4g}", f"{row.difference:+.3g}"]
    interval = f"[{row.low:+.3g}, {row.high:+.3g}]"
    return [row.suite, row.task, row.metric, *figures, interval, f"{row.p_value:.2g}", compared.verdict,
            str(row.num_items), *flips]  # fmt: skip


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # names to the left, figures to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _markdown(lines: list[list[str]]) -> str:
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def _plain(compared: Compared) -> dict[str, Any]:
    mine, theirs = compared.labels
    return compared.row.model_dump(mode="json") | {"a": mine, "b": theirs, "verdict": compared.verdict}


def _csv(rows: Sequence[Compared]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*PairRow.model_fields, "a", "b", "verdict"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_plain(each) for each in rows)
    return text.getvalue().rstrip("\n")
