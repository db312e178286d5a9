"""A night's figures from night to night, with what got worse. What is worse the night itself has judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from flows.errors import SpecError
from flows.records.figures.inputs import Recorded, counted, protocol_of
from flows.records.report.protocol import columns_of
from infra.figures.panels import Drawing, Panel, Series, in_rows
from infra.registry import did_you_mean
from infra.results.rows import MetricRow
from infra.results.store import ResultsStore

_MOST_PANELS = 12
#: of more lines in a panel those to which nothing happened are grey
_MOST_COLOURED = 7
_MOST_DATES = 8
_UNCHANGED = "others, in no night worse"
_Name = tuple[str, str, str]
"""Suite, task, metric."""


@dataclass(frozen=True)
class _Point:
    night: int
    value: float
    stage_key: str
    verdict: str
    gate: str | None
    higher_is_better: bool

    @property
    def bad(self) -> bool:
        return self.verdict == "worse" or self.gate == "failed"


_Lines = dict[tuple[str, str], list[_Point]]
"""By cell and checkpoint."""


def over_nights(recorded: Recorded) -> Drawing | None:
    """A panel per figure, what got worse first; a line per cell and checkpoint, cells that share a stage have one.

    The runs name the night; without any it is the newest. Raises SpecError for one that is not there, or several.
    """
    name = _night(recorded.results, recorded.runs)
    if name is None:
        return None
    nights, figures = _read(recorded.results, name)
    if not figures:
        return None
    order = sorted(figures, key=lambda figure: _rank(figure, figures[figure]))
    shown = order[:_MOST_PANELS]
    ticks = _dates(nights)
    panels = [_panel(figure, figures[figure], ticks) for figure in shown]
    notes = (
        f"nights of {name}: {len(nights)}; a cross: worse than in the last good night beyond noise, as that night "
        "judged it, or a gate that failed; a line ends where the figure was not measured",
        *counted(len(order) - len(shown), "not shown: {} more figures; slimline nights tells of those that got worse"),
        *_told(figures, nights),
        *_protocol(recorded, name, shown),
    )
    return Drawing(f"{name}, night after night", in_rows(panels, 2), notes)


def _night(results: ResultsStore, wanted: Sequence[str]) -> str | None:
    nights = results.nights()
    names = {night.night_id: night.name for night in nights} | {night.name: night.name for night in nights}
    if not wanted:
        return nights[-1].name if nights else None
    for each in wanted:
        if each not in names:
            known = ", ".join(sorted(set(names.values()))) or "none"
            raise SpecError(f"no night {each!r}{did_you_mean(each, names)}; there are: {known}")
    found = {names[each] for each in wanted}
    if len(found) > 1:
        raise SpecError(f"history shows the nights of one name, not of {', '.join(sorted(found))}: give one --run")
    return found.pop()


def _read(results: ResultsStore, name: str) -> tuple[list[datetime], dict[_Name, _Lines]]:
    """When each night began, and every figure of them."""
    started = {night.night_id: night.started_at for night in results.nights(name)}
    places = {night_id: place for place, night_id in enumerate(started)}
    rows = results.select(
        "SELECT night_id, suite, task, metric, cell, checkpoint, value, stage_key, verdict, gate, higher_is_better "
        "FROM history WHERE night = ? AND verdict <> 'gone' ORDER BY started_at, suite, task, metric, cell, checkpoint",
        (name,),
    ).rows
    figures: dict[_Name, _Lines] = {}
    for night_id, suite, task, metric, cell, checkpoint, *point in rows:
        lines = figures.setdefault((suite, task, metric), {})
        lines.setdefault((cell, checkpoint), []).append(_Point(places[night_id], *point))
    return list(started.values()), figures


def _is_bad(lines: _Lines) -> bool:
    return any(point.bad for points in lines.values() for point in points)


def _rank(figure: _Name, lines: _Lines) -> tuple[object, ...]:
    """What got worse first, then qualities, then the rest."""
    is_quality = figure[2].startswith("ppl@") or figure[2].startswith("acc")
    return not _is_bad(lines), not is_quality, figure[0] == "profile", figure


def _panel(figure: _Name, lines: _Lines, ticks: tuple[tuple[float, str], ...]) -> Panel:
    shared: dict[tuple[_Point, ...], list[tuple[str, str]]] = {}
    for one, measured in lines.items():
        shared.setdefault(tuple(measured), []).append(one)
    coloured = sorted(shared, key=lambda points: (_interest(points), shared[points]))[:_MOST_COLOURED]
    series = []
    style = 0
    for points, who in sorted(shared.items(), key=lambda each: each[1]):
        bad = any(point.bad for point in points)
        x, y = tuple(float(point.night) for point in points), tuple(point.value for point in points)
        if not (bad or points in coloured):
            series.append(Series(_UNCHANGED, x, y, None, "solid"))
            continue
        crossed = tuple(index for index, point in enumerate(points) if point.bad)
        names = tuple(map(_event, points))
        series.append(Series(_label(who), x, y, style, names=names, crossed=crossed))
        style += 1
    suite, task, metric = figure
    is_ppl = metric.startswith("ppl@")
    word = "higher" if next(iter(shared))[0].higher_is_better else "lower"
    title = suite if suite == task else f"{suite}: {task}"
    return Panel(title, "night", f"{metric} ({word} is better)", tuple(series), x_ticks=ticks, y_log=is_ppl)


def _event(point: _Point) -> str:
    """What is said at a point, if anything."""
    verdict = point.verdict if point.verdict in ("worse", "better") else ""
    return ", ".join(filter(None, (verdict, "gate failed" if point.gate == "failed" else "")))


def _interest(points: Sequence[_Point]) -> int:
    """What got worse stands out, then what changed."""
    if any(point.bad for point in points):
        return 0
    return 1 if len({point.value for point in points}) > 1 else 2


def _label(who: Sequence[tuple[str, str]]) -> str:
    (cell, checkpoint), *others = who
    return f"{checkpoint} of {len(who)} cells" if others else f"{cell} {checkpoint}"


def _dates(nights: Sequence[datetime]) -> tuple[tuple[float, str], ...]:
    """At most so many, the last night always."""
    days = [night.strftime("%Y-%m-%d") for night in nights]
    texts = [f"{day[5:]} {night:%H:%M}" if days.count(day) > 1 else day[5:]
             for day, night in zip(days, nights, strict=True)]  # fmt: skip
    step = -(-len(texts) // _MOST_DATES)
    return tuple((float(place), texts[place]) for place in range(len(texts) - 1, -1, -step))[::-1]


def _told(figures: Mapping[_Name, _Lines], nights: Sequence[datetime]) -> Iterable[str]:
    """A sentence for the last night: how many of its figures got worse."""
    last = [point for lines in figures.values() for points in lines.values() for point in points
            if point.night == len(nights) - 1]  # fmt: skip
    yield f"the last one, of {nights[-1]:%Y-%m-%d %H:%M} UTC: {sum(point.verdict == 'worse' for point in last)} of " \
          f"{len(last)} figures worse, {sum(point.verdict == 'better' for point in last)} better"  # fmt: skip


def _protocol(recorded: Recorded, name: str, shown: Sequence[_Name]) -> tuple[str, ...]:
    """Of the runs of the last night, as far as they are recorded."""
    night = recorded.results.nights(name)[-1]
    known = {run.run_key for run in recorded.results.runs()}
    cells = [cell.run_key for cell in recorded.results.night_cells(night.night_id)]
    keys = [key for key in cells if key is not None and key in known]
    if not keys:
        return ()

    def figure(row: MetricRow) -> str | None:
        here = (row.suite, row.task, row.metric)
        return f"{row.suite}: {row.task} {row.metric}" if here in shown else None

    runs = Recorded(recorded.results, recorded.artifacts, keys)
    entries = runs.entries(lambda entry: True, "true")
    return protocol_of(entries, columns_of(entries, figure))
