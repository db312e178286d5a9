"""What is left of the quality against what it costs: parameters, latency, memory, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from flows.records.figures.inputs import Recorded, counted, labels_of, protocol_of
from flows.records.report.entries import Entry
from flows.records.report.papers import quality
from flows.records.report.protocol import columns_of
from infra.figures.panels import Drawing, Panel, Series, in_rows
from infra.results.rows import MetricRow

_COSTS = {
    "decode_ms_per_token_p50": "decode latency (ms per token, median)",
    "peak_memory_gib": "peak memory (GiB)",
}
_PARAMETERS = "parameters (millions)"
_FRONT = "Pareto front"
#: relative
_SAME_COST = 0.005
#: so many times the best perplexity of a panel: what is above would press all others together
_OFF_SCALE = 50
_CLOSE = 0.02
_MEAN = "mean acc of "
#: black, with no marker of its own
_FRONT_STYLE = -1


def quality_by_cost(recorded: Recorded) -> Drawing | None:
    """A row of panels per perplexity and for the mean accuracy: against parameters, decode latency and memory."""
    condition = "metric LIKE 'ppl@%' OR metric IN ('acc', 'acc_norm') OR suite = 'profile'"
    entries = recorded.entries(lambda entry: True, condition)
    qualities = columns_of([replace(entry, metrics=(*entry.metrics, *_means(entry))) for entry in entries], _quality)
    costs = columns_of(entries, _cost)
    sizes = {entry.row.checkpoint_key: number / 1e6 for entry in entries if (number := _parameters(entry))}
    values = {_PARAMETERS: sizes} | {
        name: {row.checkpoint_key: row.value for row in rows} for name, rows in costs.items()
    }
    labels, styles = labels_of(entries), _styles(entries)
    rows = []
    for name, found in qualities.items():
        panels = [_panel(name, found, cost, known, entries, labels, styles) for cost, known in values.items()]
        rows.append([panel for panel in panels if len({x for each in panel.series for x in each.x}) > 1])
    if not any(rows):
        return None
    placed = {key for found in values.values() for key in found}
    measured = {row.checkpoint_key for found in qualities.values() for row in found}
    shown = [entry for entry in entries if entry.row.checkpoint_key in placed & measured]
    missing = len(measured - placed)
    notes = (
        "Pareto front (its checkpoints are named): no other of its panel is cheaper and as good, or better at its cost",
        *counted(missing, "not shown: {} more checkpoints, whose sizes, latency and memory are not recorded"),
        *protocol_of(shown, {**qualities, **costs}),
    )
    panels = [panel for row in rows for panel in row]
    # a row per quality if all have the same costs, else one panel after another
    beside = len(rows[0]) if len({len(row) for row in rows}) == 1 else 2
    return Drawing("Quality by cost", in_rows(panels, max(2, beside)), notes)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (cost, loss), the lower the better, no other beats: in order of cost. As the view `pareto` has it, costs
    within half a percent are no difference."""
    best, found = math.inf, []
    for cost in sorted({cost for cost, _ in points}):
        loss = min(loss for at, loss in points if at == cost)
        if loss < best:
            best = loss
            if loss <= min(other for at, other in points if at <= cost + _SAME_COST * abs(cost)):
                found += [index for index, point in enumerate(points) if point == (cost, loss)]
    return found


def _cost(row: MetricRow) -> str | None:
    return _COSTS.get(row.metric) if row.suite == "profile" and row.task == "profile" else None


def _parameters(entry: Entry) -> float | None:
    """As recorded with it, else as a profile of it counted them."""
    counted = (row.value for row in entry.metrics if row.suite == "profile" and row.metric == "num_parameters")
    return entry.row.num_parameters or next(counted, None)


def _named(best: Sequence[tuple[str, float, float, str]]) -> dict[str, str]:
    """What stands at the points of the front, (label, cost, quality, key): those that nearly touch share a text."""
    width = max((cost for _, cost, _, _ in best), default=0.0) - min((cost for _, cost, _, _ in best), default=0.0)
    named: dict[str, str] = {}
    last: tuple[float, float, str] | None = None
    for label, cost, value, key in sorted(best, key=lambda point: point[1:]):
        if last and abs(cost - last[0]) <= _CLOSE * width and abs(value - last[1]) <= _CLOSE * abs(value):
            named[last[2]] += f", {label}"
        else:
            named[key] = label
            last = cost, value, key
    return named


def _means(entry: Entry) -> Iterator[MetricRow]:
    """The mean accuracy of each suite's tasks, where the papers' average of seven is not recorded."""
    suites: dict[str, list[MetricRow]] = {}
    for row in entry.metrics:
        if row.metric == "acc" and row.num_fewshot == 0 and not row.suite.startswith("mmlu"):
            suites.setdefault(row.suite, []).append(row)
    for rows in suites.values():
        tasks = sorted(row.task for row in rows)
        if len(rows) > 1 and "average" not in tasks:
            mean = sum(row.value for row in rows) / len(rows)
            yield rows[0].model_copy(update={"task": f"{_MEAN}{', '.join(tasks)}", "value": mean, "stderr": None})


def _quality(row: MetricRow) -> str | None:
    return row.task if row.task.startswith(_MEAN) else quality(row)


def _made_by(entry: Entry) -> str:
    return " + ".join(filter(None, (entry.row.method, entry.row.recovery))) or "dense"


def _styles(entries: Iterable[Entry]) -> dict[str, int]:
    return {name: style for style, name in enumerate(dict.fromkeys(map(_made_by, entries)))}


def _panel(
    name: str,
    rows: Sequence[MetricRow],
    cost: str,
    known: Mapping[str, float],
    entries: Sequence[Entry],
    labels: Mapping[str, str],
    styles: Mapping[str, int],
) -> Panel:
    is_ppl = "ppl@" in name
    measured = {row.checkpoint_key: row.value for row in rows if row.checkpoint_key in known}
    points = {key: (known[key], value) for key, value in measured.items() if math.isfinite(value)}
    ranked = front([(x, y if is_ppl else -y) for x, y in points.values()])
    best = [list(points)[index] for index in ranked]
    lowest = min((value for _, value in points.values() if value > 0), default=math.inf)
    y_max = _OFF_SCALE * lowest if is_ppl else math.inf
    line = sorted(points[key] for key in best if points[key][1] <= y_max)
    series = [
        Series(_FRONT, tuple(x for x, _ in line), tuple(y for _, y in line), _FRONT_STYLE, "dotted", markers=False)
    ]
    named = _named([(labels[key], *points[key], key) for key in best if points[key][1] <= y_max])
    for maker, style in styles.items():
        keys = [e.row.checkpoint_key for e in entries if _made_by(e) == maker and e.row.checkpoint_key in measured]
        if keys:
            x, y = tuple(known[key] for key in keys), tuple(measured[key] for key in keys)
            names = tuple(named.get(key, "") for key in keys)
            series.append(Series(maker, x, y, style, "none", names=names))
    word = "lower" if is_ppl else "higher"
    y_label = f"{'perplexity' if is_ppl else 'accuracy'} ({word} is better)"
    return Panel(name, cost, y_label, tuple(series), y_log=is_ppl, y_max=y_max)
