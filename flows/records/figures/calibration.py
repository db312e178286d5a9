"""SlimGPT's figure 3: how many calibration windows, and how long ones, against what is left."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from flows.records.figures.inputs import Recorded, amount_of, protocol_of
from flows.records.report.entries import Entry
from flows.records.report.papers import quality
from flows.records.report.protocol import calibration_of, columns_of
from infra.figures.panels import Drawing, Panel, Series
from infra.results.rows import MetricRow

#: the options that are the point of it: at the axis, and as the other one is told
_VARIED = {
    "num_samples": ("calibration windows", "{} windows"),
    "seq_len": ("tokens of each calibration window", "windows of {} tokens"),
}
_Group = dict[float, Entry]


def calibration_size(recorded: Recorded) -> Drawing | None:
    """A row of panels per figure, one for the number of windows and one for their length; checkpoints that differ in
    nothing else are a line."""
    condition = "metric LIKE 'ppl@%' OR metric IN ('acc', 'acc_norm')"
    entries = recorded.entries(lambda entry: entry.row.action == "prune" and bool(calibration_of(entry)), condition)
    lines = {option: _lines(option, entries) for option in _VARIED}
    used = {entry.row.checkpoint_key: entry for found in lines.values() for group in found.values()
            for entry in group.values()}  # fmt: skip
    columns = columns_of(used.values(), quality)
    labels = dict.fromkeys(label for found in lines.values() for label in found)
    styles = {label: style for style, label in enumerate(labels)}
    options = [option for option in _VARIED if lines[option]]
    rows = tuple(tuple(_panel(name, rows, option, lines[option], styles) for option in options)
                 for name, rows in columns.items())  # fmt: skip
    if not any(panel.series for row in rows for panel in row):
        return None
    notes = (
        "joined: checkpoints that differ in nothing but the option at the axis; bars: one standard error",
        *protocol_of(list(used.values()), columns),
    )
    return Drawing("Size of the calibration set", rows, notes)


def _lines(option: str, entries: Iterable[Entry]) -> dict[str, _Group]:
    """By what is said in the legend: of each line its checkpoints by the value of the option, the newest of each."""
    found: dict[str, _Group] = {}
    for entry in entries:
        rest = {path: value for path, value in entry.options.items() if not path.endswith(f".calibration.{option}")}
        value = calibration_of(entry).get(option)
        if isinstance(value, int | float):
            found.setdefault(json.dumps(rest, sort_keys=True), {}).setdefault(float(value), entry)
    named: dict[str, _Group] = {}
    for group in found.values():
        if len(group) > 1:
            label = _label(option, next(iter(group.values())))
            while label in named:
                label += " *"
            named[label] = dict(sorted(group.items()))
    return named


def _label(option: str, entry: Entry) -> str:
    other = next(name for name in _VARIED if name != option)
    kept = _VARIED[other][1].format(calibration_of(entry).get(other))
    return f"{entry.row.method} {amount_of(entry)}, {kept}"


def _panel(
    name: str, rows: Sequence[MetricRow], option: str, lines: Mapping[str, _Group], styles: Mapping[str, int]
) -> Panel:
    by_key = {row.checkpoint_key: row for row in rows}
    series = []
    values: set[float] = set()
    for label, group in lines.items():
        points = {
            value: row for value, entry in group.items() if (row := by_key.get(entry.row.checkpoint_key)) is not None
        }
        if points:
            values |= points.keys()
            y, spread = tuple(row.value for row in points.values()), tuple(row.stderr for row in points.values())
            series.append(Series(label, tuple(points), y, styles[label], spread=spread))
    ticks = tuple((value, f"{value:g}") for value in sorted(values))
    word = "lower" if "ppl@" in name else "higher"
    y_label = f"{'perplexity' if 'ppl@' in name else 'accuracy'} ({word} is better)"
    return Panel(name, _VARIED[option][0], y_label, tuple(series), x_log=True, x_ticks=ticks)
