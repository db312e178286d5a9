"""A Drawing as SVG, PNG or PDF. The only importer of matplotlib, which takes half a second: inside the functions.

No meaning has a colour alone: markers, line styles, numbers and legends say the same. Colours are those of Okabe and
Ito (2008), which people with any colour vision tell apart. Nothing outside the Drawing changes the bytes: no date, no
settings of the user's matplotlib, only the font that it ships. In SVG texts are texts: found, read aloud, translated.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, get_args

from infra.figures.panels import Drawing, HeatMap, Panel, Series
from infra.figures.text import Measure, plain, short, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Form = Literal["svg", "png", "pdf"]
FORMS: tuple[Form, ...] = get_args(Form)

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#9A9A9A"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES: dict[str, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5)), "none": "none"}
_RULES = {
    **{"font.family": ["DejaVu Sans"], "font.size": 8, "axes.titlesize": 7.5, "axes.labelsize": 7.5},
    **{
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "lines.linewidth": 1.1,
        "lines.markeredgewidth": 0.9,
    },
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **{"grid.color": "#E2E2E2", "grid.linewidth": 0.6, "axes.linewidth": 0.7, "hatch.linewidth": 0.5},
    # a "$" in a name begins no formula
    **{"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "slimline", "pdf.fonttype": 42},
}
_METADATA: dict[Form, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
#: inches
_WIDTH, _PER_COLUMN, _MARGIN, _LINE = 7.2, 3.4, 0.08, 0.102
_NOTE_SIZE, _TITLE_SIZE, _LEGEND_SIZE, _LABEL_SIZE = 6.0, 9.5, 7.0, 7.5
#: what axes need beside what they show
_AROUND = 0.6
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: of this many decades and more only powers of ten are labelled
_MANY_DECADES = 3
#: a name of so many signs is as wide as a marker
_SHORT_NAME = 3
#: rcParams belong to the process
_ONE_AT_A_TIME = Lock()


def draw(drawing: Drawing, form: Form) -> bytes:
    """The figure as a file's content. Raises ValueError if it has no panel."""
    if not any(True for _ in drawing.panels()):
        raise ValueError("a figure without panels cannot be drawn")
    with _ONE_AT_A_TIME:
        from matplotlib import style

        # of a sign that the font lacks an SVG still has the text, and a PNG a box
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from (current )?font")
        with style.context(["default", _RULES]):
            figure = _figure(drawing)
            out = io.BytesIO()
            metadata = {**_METADATA[form], "Title": plain(drawing.title)}
            figure.savefig(out, format=form, dpi=200, metadata=metadata, facecolor="white")
    return out.getvalue()


def _figure(drawing: Drawing) -> Figure:
    """From top to bottom: title, panels, legend, notes; as high as they need."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = len(drawing.rows[0])
    width = max(_WIDTH, columns * _PER_COLUMN)
    room = width - 2 * _MARGIN
    figure = Figure(figsize=(width, 1))
    measure = _measure(FigureCanvasAgg(figure).get_renderer())  # type: ignore[no-untyped-call]
    title = wrapped(drawing.title, _TITLE_SIZE, room, measure)
    notes = [line for note in (*drawing.notes, *drawing.not_drawn()) for line in
             wrapped(note, _NOTE_SIZE, room, measure)]  # fmt: skip
    heights = [max(panel.height for panel in row if panel is not None) for row in drawing.rows]
    handles = _panels(figure, drawing, heights, lambda panel: _fitted(panel, width / columns, measure))
    beside, legend = _legend_size(handles, room, measure)
    head, foot = len(title) * 0.17 + _MARGIN, len(notes) * _LINE + 2 * _MARGIN
    height = head + sum(heights) + legend + foot
    figure.set_size_inches(width, height)
    rect = (0, (foot + legend) / height, 1, sum(heights) / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=rect))
    left, top, below = _MARGIN / width, 1 - _MARGIN / height, (foot - _MARGIN) / height
    figure.text(left, top, "\n".join(title), size=_TITLE_SIZE, weight="bold", va="top")
    figure.text(left, below, "\n".join(notes), size=_NOTE_SIZE, va="top", color="#404040", linespacing=1.2)
    if handles:
        figure.legend(
            list(handles.values()), [short(label) for label in handles], loc="upper center",
            bbox_to_anchor=(0.5, (foot + legend) / height), ncols=beside, frameon=False, handlelength=2.6,
            columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip
    return figure


def _panels(
    figure: Figure, drawing: Drawing, heights: Sequence[float], fitted: Callable[[Panel], Panel]
) -> dict[str, Any]:
    """Draw all of them; returns what the legend shows, by label."""
    axes = figure.subplots(len(heights), len(drawing.rows[0]), squeeze=False, gridspec_kw={"height_ratios": heights})
    handles: dict[str, Any] = {}
    for row, places in zip(drawing.rows, axes, strict=True):
        for panel, place in zip(row, places, strict=True):
            if panel is None:
                place.set_axis_off()
            else:
                handles |= _fill(place, fitted(panel))
    _colour_bar(figure, drawing, axes)
    return handles


def _legend_size(labels: Iterable[str], room: float, measure: Measure) -> tuple[int, float]:
    """How many stand beside each other, and how high all of them are, in inches."""
    widths = [measure(short(label), _LEGEND_SIZE) + 0.55 for label in labels]
    if not widths:
        return 1, 0.0
    beside = max(1, min(len(widths), int(room / max(widths))))
    return beside, math.ceil(len(widths) / beside) * 0.155 + 0.12


def _fitted(panel: Panel, width: float, measure: Measure) -> Panel:
    """With title and label of the y axis in lines that do not reach the panels beside, above and below."""
    title = "\n".join(wrapped(panel.title, _LABEL_SIZE, width - _AROUND, measure))
    y_label = "\n".join(wrapped(panel.y_label, _LABEL_SIZE, panel.height - _AROUND, measure))
    return replace(panel, title=title, y_label=y_label)


def _fill(axes: Axes, panel: Panel) -> dict[str, Any]:
    """Draw a panel; returns what its legend shows, by label."""
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(plain(panel.x_label))
    axes.set_ylabel(panel.y_label)
    if panel.heat is not None:
        _heat(axes, panel.heat, panel)
        return {}
    if panel.x_log:
        axes.set_xscale("log")
    if panel.y_log:
        axes.set_yscale("log", nonpositive="mask")
    handles = {}
    for index, series in enumerate(panel.series):
        # of equal lines the lower ones have larger markers, so that all are seen
        covered = sum((series.x, series.y) == (above.x, above.y) for above in panel.series[index + 1 :])
        handle = _curve(axes, series, panel, 4 + 1.6 * covered)
        if series.label:
            handles[series.label] = handle
    axes.margins(
        x=0.08 if any(len(name) > _SHORT_NAME for series in panel.series for name in series.names) else 0.05, y=0.1
    )
    axes.autoscale_view()
    _ticks(axes, panel)
    return handles


def _curve(axes: Axes, series: Series, panel: Panel, size: float) -> Any:
    y = [value if panel.shows(x, value) else math.nan for x, value in zip(series.x, series.y, strict=True)]
    colour = _GREY if series.style is None else _COLOURS[series.style % len(_COLOURS)]
    marker = _MARKERS[(series.style or 0) % len(_MARKERS)] if series.markers else None
    # what comes round to a colour again has other dashes
    again = series.style is not None and series.style >= len(_COLOURS) and series.dashes == "solid"
    dashes = (0, (6, 1.5, 1, 1.5)) if again else _DASHES[series.dashes]
    look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": size}
    if series.hollow:
        look["markerfacecolor"] = "white"
    if series.style is None:
        look |= {"linewidth": 0.7, "markersize": 2.5, "zorder": 1.5}
    (line,) = axes.plot(series.x, y, **look)
    for index in series.crossed:
        axes.plot([series.x[index]], [y[index]], marker="x", markersize=9, markeredgewidth=1.6, color="black", zorder=4)
    for x, value, spread in zip(series.x, y, series.spread, strict=False):
        if spread is not None and math.isfinite(spread):
            axes.errorbar([x], [value], yerr=[[spread]] * 2, color=colour, elinewidth=0.7, capsize=1.5, fmt="none")
    for x, value, name in zip(series.x, y, series.names, strict=False):
        if name and math.isfinite(value):
            side = _side(x, panel) if len(name) > _SHORT_NAME else 0
            axes.annotate(
                plain(short(name)), (x, value), xytext=(2 * side, 4.5), textcoords="offset points", size=5.5,
                ha=("right", "center", "left")[side + 1], color="#303030",
            )  # fmt: skip
    return line


def _side(x: float, panel: Panel) -> int:
    """Where a name goes so that it stays within the axes: 1 to the right of its point, -1 to the left, 0 above."""
    values = [value for series in panel.series for value in series.x]
    low, high = min(values), max(values)
    place = 0.5 if low == high else (x - low) / (high - low)
    return 1 if place < 0.3 else -1 if place > 0.7 else 0


def _ticks(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    for axis, logarithmic in ((axes.xaxis, panel.x_log), (axes.yaxis, panel.y_log)):
        if logarithmic:
            low, high = sorted(axis.get_view_interval())
            decades = math.log10(high / low) if low > 0 else math.inf
            subs = (1, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < _MANY_DECADES else (1,)
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(_number))
            axis.set_minor_formatter(NullFormatter())
    if panel.x_ticks:
        axes.set_xticks([position for position, _ in panel.x_ticks], [plain(label) for _, label in panel.x_ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    elif panel.whole_x and not panel.x_log:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _number(value: float, place: int) -> str:
    """Of a logarithmic axis; outside of what is easily read a power of ten with its factor."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    factor, power = f"{value:e}".split("e")
    sign = "" if float(factor) == 1 else f"{float(factor):g}·"
    return f"{sign}10{str(int(power)).translate(_RAISED)}"


def _heat(axes: Axes, heat: HeatMap, panel: Panel) -> None:
    values = [list(row) for row in heat.values]
    axes.set_facecolor("white")
    axes.grid(False)
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("#B0B0B0")
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    many = len(heat.rows) > 12 and all(label.isdigit() for label in heat.rows)
    shown = range(0, len(heat.rows), 5 if many else 1)
    axes.set_yticks(list(shown), [plain(short(heat.rows[index])) for index in shown])
    for index, end in enumerate(heat.ends):
        axes.annotate(
            plain(end), (1, index), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", size=5 if len(heat.rows) > 12 else 6, annotation_clip=False,
        )  # fmt: skip
    for index, texts in enumerate(heat.texts):
        for column, text in enumerate(texts):
            colour = "white" if values[index][column] > 0.55 else "black"
            axes.text(column, index, plain(text), ha="center", va="center", size=4.5, color=colour)
    if panel.x_ticks:
        axes.set_xticks([position for position, _ in panel.x_ticks], [plain(label) for _, label in panel.x_ticks])


def _colour_bar(figure: Figure, drawing: Drawing, axes: Any) -> None:
    """One for each unit, beside all heat maps that have it."""
    places: dict[str, list[Any]] = {}
    for row, beside in zip(drawing.rows, axes, strict=True):
        for panel, place in zip(row, beside, strict=True):
            if panel is not None and panel.heat is not None:
                places.setdefault(panel.heat.unit, []).append(place)
    for unit, found in places.items():
        bar = figure.colorbar(found[0].images[0], ax=found, pad=0.01, fraction=0.03, aspect=30)
        bar.set_label(plain(unit))


def _measure(renderer: Any) -> Measure:
    """Width of a text of a size in points, in inches, as the sum of the widths of its signs."""
    from matplotlib.font_manager import FontProperties

    known: dict[str, float] = {}
    font = FontProperties(family=["DejaVu Sans"], size=100)

    def measure(text: str, size: float) -> float:
        for char in set(text) - known.keys():
            known[char] = renderer.get_text_width_height_descent(char, font, False)[0] / renderer.dpi / 100
        return sum(known[char] for char in text) * size

    return measure
