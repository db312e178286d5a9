"""Texts as they fit into a figure. Imports no matplotlib: widths come from who measures them."""

from __future__ import annotations

from collections.abc import Callable

Measure = Callable[[str, float], float]
"""Width of a text of a size in points, in inches."""

_LONGEST_LABEL = 60


def plain(text: str) -> str:
    """Text of one line without signs that no file may hold."""
    return "".join(char if char.isprintable() else " " for char in text)


def short(text: str) -> str:
    """The same, cut if it is long."""
    text = plain(text)
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"


def wrapped(text: str, size: float, width: float, measure: Measure) -> list[str]:
    """Lines of at most `width` inches; words that are longer are cut."""
    room = 0.97 * width  # small signs are rounded to pixels
    lines = [""]
    for word in plain(text).split(" "):
        if measure(f"{lines[-1]} {word}", size) <= room or not lines[-1]:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
        else:
            lines.append(word)
        while measure(lines[-1], size) > room:
            fits = _fitting(lines[-1], size, room, measure)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


def _fitting(text: str, size: float, room: float, measure: Measure) -> int:
    used = 0.0
    for index, char in enumerate(text):
        used += measure(char, size)
        if used > room:
            return max(1, index)
    return len(text)
