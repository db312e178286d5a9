"""What a figure is made from, and the sentences under it that say how that was measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flows.records.report.entries import Entry, read_entries
from flows.records.report.protocol import calibration_of, figure_lines, model_line, runs_of
from flows.records.tables import in_one_line
from infra.artifacts.store import ArtifactStore
from infra.results.rows import CurveRow, LayerRow, MetricRow, OfRun
from infra.results.store import ResultsStore

R = TypeVar("R", bound=OfRun)

#: that of metrics of which none is wanted
_NOTHING = "false"
_MOST_RUNS = 8


@dataclass(frozen=True)
class Recorded:
    """Where everything lies. runs: names or keys; empty: the newest run of every spec."""

    results: ResultsStore
    artifacts: ArtifactStore
    runs: Sequence[str] = ()

    def entries(self, keeps: Callable[[Entry], bool], condition: str = _NOTHING) -> tuple[Entry, ...]:
        """The checkpoints of the runs with those of their metrics for which the SQL condition holds, in a fixed order:
        models, the dense one, methods, what was removed. Raises SpecError for a run that is not there."""
        found = (entry for entry in read_entries(self.results, condition, self.runs) if keeps(entry))
        return tuple(sorted(found, key=_place))

    def layers(self, entries: Iterable[Entry]) -> dict[str, list[LayerRow]]:
        """By checkpoint key what its pruning did to every layer, in order; nothing of a checkpoint without any."""
        return self._by_stage(LayerRow, "layers", entries, "layer, sub_layer")

    def curves(self, entries: Iterable[Entry]) -> dict[str, list[CurveRow]]:
        """By checkpoint key the points of the training that made it, in order of steps."""
        return self._by_stage(CurveRow, "curves", entries, "metric, step")

    def _by_stage(self, row: type[R], table: str, entries: Iterable[Entry], point: str) -> dict[str, list[R]]:
        """Every run that has a stage has its rows: those of the newest run are taken."""
        names = list(row.model_fields)
        wanted = [f"{next(iter(entry.runs))} {entry.row.checkpoint_key}" for entry in entries]
        answer = self.results.select(
            f"SELECT {', '.join(names)} FROM {table} WHERE list_contains(?, concat(run_key, ' ', stage_key)) "
            f"ORDER BY {point}",
            (wanted,),
        )
        found: dict[str, list[R]] = {}
        for values in answer.rows:
            read = row.model_validate(dict(zip(names, values, strict=True)))
            found.setdefault(str(values[names.index("stage_key")]), []).append(read)
        return found


def labels_of(entries: Sequence[Entry]) -> dict[str, str]:
    """By checkpoint key a name that no other has: with the model if there are several, with the spec if it must be."""
    several = len({entry.row.model for entry in entries}) > 1
    short = {
        e.row.checkpoint_key: f"{e.row.model} {e.row.checkpoint}" if several else e.row.checkpoint for e in entries
    }
    count = Counter(short.values())
    named = {
        entry.row.checkpoint_key: f"{name} ({next(iter(entry.runs.values()))})" if count[name] > 1 else name
        for entry in entries
        for name in (short[entry.row.checkpoint_key],)
    }
    count = Counter(named.values())
    return {key: f"{name} {key[-6:]}" if count[name] > 1 else name for key, name in named.items()}


def protocol_of(entries: Sequence[Entry], columns: Mapping[str, Sequence[MetricRow]] | None = None) -> tuple[str, ...]:
    """Every model with its calibration sets, the options of the steps, how the figures were taken, data, runs."""
    models: dict[str, list[Entry]] = {}
    for entry in entries:
        same = {path: value for path, value in entry.options.items() if path.startswith("model.")}
        models.setdefault(json.dumps(same, sort_keys=True), []).append(entry)
    lines = [*map(model_line, models.values()), *_calibrations(entries)]
    runs = runs_of(entries, columns or {})
    more = f" and {len(runs) - _MOST_RUNS} more" if len(runs) > _MOST_RUNS else ""
    names = f"runs: {', '.join(runs[:_MOST_RUNS])}{more}"
    return tuple(dict.fromkeys([*lines, *_steps(entries), *figure_lines(columns or {}), names]))


def counted(count: int, sentence: str) -> tuple[str, ...]:
    """The sentence with the count in the place of its {}, nothing if it is zero."""
    return (sentence.format(count),) if count else ()


def amount_of(entry: Entry) -> str:
    """What was asked to go: "20 %" of the dense decoder, else so many layers; "" if nothing was."""
    if entry.row.total_sparsity is not None:
        return f"{100 * entry.row.total_sparsity:g} %"
    asked = [value for path, value in entry.options.items() if path.endswith(".layers") and value is not None]
    return " + ".join(f"{value} layers" for value in asked)


def _calibrations(entries: Iterable[Entry]) -> Iterator[str]:
    """The options that all calibration sets share, and of the others their values."""
    sets = [found for entry in entries if (found := calibration_of(entry))]
    if sets:
        yield f"calibration: {_told(sets, with_values=True)}"


def _steps(entries: Iterable[Entry]) -> Iterator[str]:
    """The options of each chain of steps that all its checkpoints share; of the others the names."""
    chains: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.steps:
            chains.setdefault(entry.steps, []).append(entry)
    for steps, group in chains.items():
        told = [f"{name}: {_options(f'steps.{place}.', group)}" for place, name in group[0].plugins().items()]
        yield f"{steps.replace(' ', ' + ')}: {'; '.join(told)}" if len(told) > 1 else told[0]


def _options(start: str, group: Sequence[Entry]) -> str:
    """Those of one step."""
    options = [{path.removeprefix(start): value for path, value in entry.options.items() if path.startswith(start)}
               for entry in group]  # fmt: skip
    hidden = ("method", "recovery")
    return _told([
        {name: value for name, value in each.items() if name not in hidden and not name.startswith("calibration.")}
        for each in options
    ])  # fmt: skip


def _told(options: Sequence[Mapping[str, Any]], *, with_values: bool = False) -> str:
    """What all have in common; of what differs the names, or the values too."""
    values = {name: dict.fromkeys(json.dumps(each.get(name)) for each in options) for each in options for name in each}
    same = in_one_line({name: options[0].get(name) for name, found in values.items() if len(found) == 1})
    other = [
        f"{name} ({', '.join(found)})" if with_values else name for name, found in values.items() if len(found) > 1
    ]
    return ", ".join(filter(None, (same, f"differing {', '.join(other)}" if other else "")))


def _place(entry: Entry) -> tuple[object, ...]:
    row = entry.row
    return (
        *(row.model, row.method is not None, row.method or "", row.total_sparsity or 0.0, row.recovery or ""),
        *(row.checkpoint, row.checkpoint_key),
    )
