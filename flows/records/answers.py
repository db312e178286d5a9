"""The answer to a question in SQL, as text."""

from __future__ import annotations

import json
import math
from datetime import date, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from flows.records.render import aligned_table, csv_table, markdown_table

if TYPE_CHECKING:
    from infra.results.index import Answer

#: of a cell of the aligned table; protocols and specs are long
_WIDEST = 60


def render_answer(answer: Answer, form: str) -> str:
    """`form`: "table" (cells cut at 60 characters), "markdown" and "csv", where NULL is empty, and "json": a list of
    objects, in which NaN and infinity are words."""
    if form == "json":
        return json.dumps([dict(zip(_unique(answer.columns), map(_plain, row), strict=True)) for row in answer.rows])
    cells = [[_text(value) for value in row] for row in answer.rows]
    if form == "csv":
        names = _unique(answer.columns)
        return csv_table(names, [dict(zip(names, row, strict=True)) for row in cells])
    if form == "markdown":
        return markdown_table(answer.columns, cells)
    numeric = [_is_numeric([row[place] for row in answer.rows]) for place in range(len(answer.columns))]
    short = [[cell if len(cell) <= _WIDEST else f"{cell[: _WIDEST - 1]}…" for cell in row] for row in cells]
    return f"{aligned_table(answer.columns, short, numeric)}\n({len(cells)} row{'s' * (len(cells) != 1)})"


def _unique(columns: tuple[str, ...]) -> list[str]:
    """Two columns of a join may have one name."""
    return [name if name not in columns[:place] else f"{name}_{place + 1}" for place, name in enumerate(columns)]


def _is_numeric(values: list[Any]) -> bool:
    given = [value for value in values if value is not None]
    return bool(given) and all(isinstance(value, int | float | Decimal) for value in given)


def _text(value: Any) -> str:
    if value is None:
        return ""
    plain = _plain(value)
    if isinstance(plain, bool):
        return str(plain).lower()
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, float):
        # the words that pydantic writes and JavaScript reads
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, date | time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | bool) else str(value)
