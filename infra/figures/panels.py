"""What stands in a figure, without how it is drawn. Texts may come from users: they are shown as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Dashes = Literal["solid", "dashed", "dotted", "none"]


@dataclass(frozen=True)
class Series:
    """Points that belong together, joined by a line in their order (dashes "none": not joined).

    label: in the legend, which has each label once: of one label all series look alike. style: which colour and which
    marker, counted from 0; None: grey, for what is only there to compare with. hollow: markers are not filled. markers:
    draw them at all. names: a text beside each point. spread: half of the length of an error bar at each point, None
    for none. crossed: points that get a cross, whatever their style.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: int | None = 0
    dashes: Dashes = "solid"
    hollow: bool = False
    markers: bool = True
    names: tuple[str, ...] = ()
    spread: tuple[float | None, ...] = ()
    crossed: tuple[int, ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """Cells in rows, values between 0 and 1, the larger the darker; NaN: there is nothing, which is hatched.

    rows: a label at the left of each. ends: a text at the right of each, () for none. texts: in each cell, () for
    none. unit: what the values are, at the colour bar.
    """

    values: tuple[tuple[float, ...], ...]
    rows: tuple[str, ...]
    unit: str
    ends: tuple[str, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes, with series or a heat map. Labels of axes have their units.

    x_ticks: positions with their labels, () for numbers. whole_x: only whole numbers at the x axis. height: in inches,
    of a row of panels the largest counts.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...] = ()
    heat: HeatMap | None = None
    x_log: bool = False
    y_log: bool = False
    x_ticks: tuple[tuple[float, str], ...] = ()
    whole_x: bool = False
    height: float = 2.4


@dataclass(frozen=True)
class Drawing:
    """A whole figure: rows of panels, all rows of the same length (None: an empty place), and sentences below."""

    title: str
    rows: tuple[tuple[Panel | None, ...], ...]
    notes: tuple[str, ...] = ()

    def panels(self) -> Iterator[Panel]:
        """All of them, row by row."""
        return (panel for row in self.rows for panel in row if panel is not None)

    def not_drawn(self) -> tuple[str, ...]:
        """A sentence for each series with values that no axis has: NaN, infinity, on a logarithmic axis zero."""
        found: dict[str, None] = {}
        for panel in self.panels():
            for series in panel.series:
                lost = [y for x, y in zip(series.x, series.y, strict=True) if not (_shown(x, panel.x_log) and
                        _shown(y, panel.y_log))]  # fmt: skip
                if lost:
                    where = f" in {panel.title}" if panel.title else ""
                    found[f"not drawn of {series.label or 'the grey lines'}{where}: {', '.join(map(_word, lost))}"] = (
                        None
                    )
        return tuple(found)


def in_rows(panels: list[Panel], columns: int) -> tuple[tuple[Panel | None, ...], ...]:
    """Panels one after another, so many beside each other at most."""
    columns = max(1, min(columns, len(panels)))
    padded: list[Panel | None] = [*panels, *[None] * (-len(panels) % columns)]
    return tuple(tuple(padded[start : start + columns]) for start in range(0, len(padded), columns))


def _shown(value: float, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


def _word(value: float) -> str:
    return f"{value:g}"
