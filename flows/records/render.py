"""Tables as text: aligned for a terminal, and what other programs read: GitHub's markdown, CSV, LaTeX, HTML.

Names come from users: nothing in a cell can end its cell, or be run by what shows it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "∞": r"$\infty$"},
}


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One line per row under the headings; a "|" inside a cell is escaped, and so is what would begin an HTML tag."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)


def csv_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A line of column names and one per row, without a last line break."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def aligned_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: Sequence[bool],
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """Columns side by side, numbers to the right; a character that a terminal would obey is a space.

    bold: cells (row, column) in the terminal's bold letters.
    """
    lines = [[printable(cell) for cell in line] for line in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["rjust" if right else "ljust" for right in numeric]
    cells = [
        [getattr(cell, side)(width) for cell, width, side in zip(line, widths, sides, strict=True)] for line in lines
    ]
    for row, column in bold:
        cells[row + 1][column] = f"\x1b[1m{cells[row + 1][column]}\x1b[0m"
    return "\n".join("  ".join(line).rstrip() for line in cells)


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A tabular of the package booktabs."""
    lines = [" & ".join(map(latex_text, line)) + r" \\" for line in (headings, *rows)]
    columns = "".join("r" if right else "l" for right in numeric)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end])


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool], caption: str) -> str:
    """A table with a caption; every cell is text."""
    sides = [' class="number"' if right else "" for right in numeric]
    head = "".join(f'<th scope="col"{side}>{escape(text)}</th>' for text, side in zip(headings, sides, strict=True))
    body = ("".join(f"<td{side}>{escape(text)}</td>" for text, side in zip(row, sides, strict=True)) for row in rows)
    lines = "\n".join(f"<tr>{row}</tr>" for row in body)
    return (
        f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{lines}\n</tbody>\n</table>"
    )


def latex_text(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(char, char) for char in printable(text))


def markdown_text(text: str) -> str:
    """Text of one line that begins no HTML tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", printable(text))


def _markdown_cell(text: str) -> str:
    return markdown_text(text).replace("|", "\\|")


def printable(text: str) -> str:
    """The text in one line; a character that a terminal would obey is a space."""
    return "".join(char if char.isprintable() else " " for char in text)
