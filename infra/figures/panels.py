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
    of a row of panels the largest counts. y_max: what is above is not drawn, but told.
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
    y_max: float = math.inf

    def shows(self, x: float, y: float) -> bool:
        """Whether the axes have such a point: not NaN, infinity, above y_max, or on a logarithmic axis zero."""
        finite = math.isfinite(x) and math.isfinite(y) and y <= self.y_max
        return finite and (x > 0 or not self.x_log) and (y > 0 or not self.y_log)


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
        """A sentence for each title of panels whose axes do not have all values."""
        found: dict[str, dict[str, None]] = {}
        for panel in self.panels():
            for series in panel.series:
                lost = [y for x, y in zip(series.x, series.y, strict=True) if not panel.shows(x, y)]
                if lost:
                    values = ", ".join(f"{value:.4g}" for value in lost)
                    found.setdefault(panel.title, {})[f"{series.label or 'a grey line'} {values}"] = None
        return tuple(
            f"off the scale{f' in {title}' if title else ''}: {'; '.join(texts)}" for title, texts in found.items()
        )


def in_rows(panels: list[Panel], columns: int) -> tuple[tuple[Panel | None, ...], ...]:
    """Panels one after another, so many beside each other at most."""
    columns = max(1, min(columns, len(panels)))
    padded: list[Panel | None] = [*panels, *[None] * (-len(panels) % columns)]
    return tuple(tuple(padded[start : start + columns]) for start in range(0, len(padded), columns))
