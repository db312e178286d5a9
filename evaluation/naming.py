"""Clauses and refusals about names that are not known, or given twice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from evaluation.errors import EvaluationError


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """The clause "did you mean 'x' or 'y'?" for the known names most like `name`, the likest first; "" if none is."""
    alike = difflib.get_close_matches(name, tuple(known), n=most)
    return f"did you mean {' or '.join(map(repr, alike))}?" if alike else ""


def refuse_twice(field: str, names: Sequence[str]) -> None:
    """Raise EvaluationError if a name is given more than once."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"{field} names {', '.join(twice)} more than once; name each once")
