"""From recorded checkpoints to the sections of a table: one for each model, or for each ablation of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.errors import SpecError
from flows.records.report.entries import Entry, read_entries
from flows.records.report.papers import TABLES, PaperTable
from flows.records.report.protocol import calibration_name, columns_of, section_lines
from flows.records.tables import cell
from infra.registry import did_you_mean
from infra.results.rows import MetricRow
from infra.results.store import ResultsStore
from pruning.methods import asked_number

#: options that have a column of their own, or are the same within a section
_SHOWN_ELSEWHERE = ("sparsity", "layers", "experts", "method", "recovery", "name")
#: as the papers call the models
_PAPER_NAMES = {
    "llama-7b": "LLaMA-7B",
    "llama-7b-hf": "LLaMA-7B",
    "llama-2-7b": "LLaMA-2-7B",
    "llama-2-7b-hf": "LLaMA-2-7B",
}
MEASURED, PUBLISHED = "measured", "published"


@dataclass(frozen=True)
class Line:
    """One row: its labels by heading, and its figures, as text and as recorded, by the heading of their column."""

    labels: Mapping[str, str]
    cells: Mapping[str, str]
    metrics: Mapping[str, MetricRow] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    checkpoint_key: str = ""


@dataclass(frozen=True)
class Section:
    """One table: a row per checkpoint and published row. notes: its protocol, a sentence or list each."""

    title: str
    labels: tuple[str, ...]
    figures: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A whole table of a paper."""

    name: str
    title: str
    paper: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...]


def build_report(store: ResultsStore, name: str, runs: Sequence[str] = ()) -> Report:
    """The table of that name over the newest run of every spec, or over these runs.

    Raises SpecError for an unknown table (with the nearest), an unknown run, and if nothing recorded belongs into it,
    with what would fill it.
    """
    if name not in TABLES:
        raise SpecError(f"no table {name!r}{did_you_mean(name, TABLES)}; there are: {', '.join(TABLES)}")
    table = TABLES[name]
    entries = [entry for entry in read_entries(store, table.condition, runs) if table.keeps(entry)]
    measured = [entry for entry in entries if any(table.figure(row) for row in entry.metrics)]
    published = _published(store, name)
    groups = _groups(table, measured)
    sections = tuple(_section(table, group, published) for group in groups)
    if not any(line.metrics and line.labels["method"] != "dense" for section in sections for line in section.lines):
        raise SpecError(f"the store has nothing for {name} ({table.title}) yet; what fills it: {table.fill}")
    return Report(name, table.title, table.paper, sections, tuple(_about_published(name, published, sections)))


def _groups(table: PaperTable, entries: Sequence[Entry]) -> list[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        same = {path: value for path, value in entry.options.items() if path.startswith("model.")}
        if table.varied:
            same = {path: value for path, value in entry.options.items() if _short(path) not in table.varied}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(entry)
    return [group for group in groups.values() if not table.varied or len(group) > 1]


def _short(path: str) -> str:
    """ "curve" of "steps.0.curve"."""
    return path.split(".", 2)[2] if path.startswith("steps.") else path


def _section(table: PaperTable, entries: Sequence[Entry], published: Sequence[Mapping[str, Any]]) -> Section:
    columns = columns_of(entries, table.figure)
    varying = _varying(entries)
    lines = [_measured(entry, columns, varying) for entry in entries]
    ours = _PAPER_NAMES.get(entries[0].row.model.rpartition("/")[2].lower())
    lines += _beside([row for row in published if row["model"] == ours], columns)
    lines.sort(key=_order)
    shown = [name for name in lines[0].labels if any(line.labels[name] for line in lines)]
    if not any(line.labels["source"] == PUBLISHED for line in lines):
        shown.remove("source")
    model = entries[0].row.model
    return Section(model, tuple(shown), tuple(columns), tuple(lines), tuple(section_lines(entries, columns)))


def _varying(entries: Iterable[Entry]) -> set[tuple[str, str]]:
    """Steps, with paths of the options in which checkpoints of these steps differ, beside those that have columns of
    their own."""
    seen: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        for path, value in entry.options.items():
            seen.setdefault((entry.steps, path), set()).add(json.dumps(value))
    return {
        (steps, path)
        for (steps, path), values in seen.items()
        if len(values) > 1
        and path.startswith("steps.")
        and _short(path) not in _SHOWN_ELSEWHERE
        and ".calibration." not in path
    }


def _measured(entry: Entry, columns: Mapping[str, Sequence[MetricRow]], varying: set[tuple[str, str]]) -> Line:
    row = entry.row
    chosen = ((name, one) for name, rows in columns.items() for one in rows if one.checkpoint_key == row.checkpoint_key)
    metrics = dict(chosen)
    options = [
        f"{_short(path)}={_plain(value)}"
        for path, value in entry.options.items()
        if (entry.steps, path) in varying and value is not None
    ]
    labels = {
        "method": row.method or "dense",
        "options": ", ".join(options),
        "sparsity": _amount(entry),
        "removed": "" if entry.reached is None else f"{100 * entry.reached:.1f} %",
        "recovery": row.recovery or "",
        "calibration": calibration_name(entry),
        "source": MEASURED,
    }
    cells = {heading: cell(one) for heading, one in metrics.items()}
    return Line(labels, cells, metrics, {h: one.value for h, one in metrics.items()}, row.checkpoint_key)


def _amount(entry: Entry) -> str:
    if entry.row.method is None:
        return ""
    if entry.row.total_sparsity is not None:
        return f"{100 * entry.row.total_sparsity:g} %"
    asked = [asked_number({_short(path): value}) for path, value in entry.options.items()]
    return " + ".join(filter(None, asked))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _beside(published: Iterable[Mapping[str, Any]], columns: Mapping[str, Sequence[MetricRow]]) -> list[Line]:
    """A line for each published row that has a figure under the protocol of one of our columns."""
    lines: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in published:
        for heading, rows in columns.items():
            if _matches(row, rows[0]):
                lines.setdefault((row["method"], row["options"], row["sparsity"], row["recovery"]), {})[heading] = row[
                    "value"
                ]
    return [
        Line(
            {
                "method": method or "dense",
                "options": options or "",
                "sparsity": "" if sparsity is None else f"{100 * sparsity:g} %",
                "removed": "",
                "recovery": recovery or "",
                "calibration": "",
                "source": PUBLISHED,
            },
            {heading: f"{value:g}" for heading, value in values.items()},
            values=values,
        )
        for (method, options, sparsity, recovery), values in lines.items()
    ]


def _matches(published: Mapping[str, Any], row: MetricRow) -> bool:
    """Whether a figure of ours was taken as the paper took its own."""
    if published["requires"] is None or published["metric"] != row.metric or published["task"] not in (None, row.task):
        return False
    protocol = json.loads(row.protocol)
    for key, wanted in json.loads(published["requires"]).items():
        if protocol.get(key) not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _order(line: Line) -> tuple[Any, ...]:
    number = line.labels["sparsity"].split(" ")[0]
    amount = float(number) if number else 0.0
    method = line.labels["method"]
    return method != "dense", method, amount, line.labels["recovery"], line.labels["options"], line.labels["source"]


def _published(store: ResultsStore, name: str) -> list[dict[str, Any]]:
    found = store.select("SELECT * FROM published WHERE paper_table = ?", (name,))
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def _about_published(name: str, published: Sequence[Mapping[str, Any]], sections: Iterable[Section]) -> Iterable[str]:
    if any(line.labels["source"] == PUBLISHED for section in sections for line in section.lines):
        papers = ", ".join(dict.fromkeys(row["paper"] for row in published))
        yield f"published: as printed in {papers}; not measured by slimline"
    elif published:
        models = ", ".join(dict.fromkeys(row["model"] for row in published))
        yield (
            f"published: {len(published)} figures for {models}, none of them of a model and protocol above; "
            f"slimline sql \"SELECT * FROM published WHERE paper_table = '{name}'\" shows them"
        )
