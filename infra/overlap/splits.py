"""Whether two splits, as `datasets` writes them, can mean the same rows; how many rows there are is not known."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: one of the parts that "+" joins: a name and perhaps a slice in rows or per cent, with a word on rounding
_PART = re.compile(r"([^\[]+?)\s*(?:\[\s*(-?\d*)(%?)\s*:\s*(-?\d*)(%?)\s*\](?:\([\w ]*\))?)?")

EVERY = "all"
"""The name by which `datasets` knows all splits at once."""


@dataclass(frozen=True)
class Edge:
    """Where a slice begins or ends: in rows, below zero from the end, or in per cent."""

    value: int
    percent: bool

    def is_not_after(self, other: Edge) -> bool:
        """Whether it surely comes before the other or at the same row. Rows from the end, rows from the beginning and
        per cent of all rows cannot be compared without their number."""
        comparable = self.percent == other.percent and (self.value < 0) == (other.value < 0)
        return comparable and self.value <= other.value


@dataclass(frozen=True)
class Part:
    """A split and the slice of it that is meant; None: from its beginning, to its end."""

    name: str
    begin: Edge | None = None
    end: Edge | None = None

    def apart_from(self, other: Part) -> bool:
        """Whether no row of the one can be in the other, if both slice the same rows."""
        return _ends_before(self, other) or _ends_before(other, self)


def parts_of(split: str) -> tuple[Part, ...]:
    """What "train[:10%]+test" joins. A slice that is not understood is the whole split."""
    return tuple(map(_part, split.split("+")))


def _part(text: str) -> Part:
    found = _PART.fullmatch(text.strip())
    if found is None:
        return Part(text.partition("[")[0].strip())
    name, begin, begin_percent, end, end_percent = found.groups()
    return Part(name, _edge(begin, begin_percent), _edge(end, end_percent))


def _edge(digits: str | None, percent: str | None) -> Edge | None:
    if not digits or digits == "-":
        return None
    value = int(digits)
    return Edge(value + 100 if percent and value < 0 else value, bool(percent))


def _ends_before(first: Part, second: Part) -> bool:
    return first.end is not None and second.begin is not None and first.end.is_not_after(second.begin)
