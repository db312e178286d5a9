"""How the figures of a section were taken, in lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flows.records.protocol_diff import deciding
from flows.records.report.entries import Entry
from flows.records.tables import in_one_line, source_of, warnings_of
from infra.results.rows import MetricRow

#: how a checkpoint was timed beside the dense one, which has no such options; it changes no other figure
_OF_RATIOS = "ratio"
#: figures that are the same on every machine
_COUNTED = ("num_parameters", "num_decoder_parameters")


def identity(row: MetricRow) -> str:
    """What must be the same of two figures that stand in one column."""
    if row.metric in _COUNTED:
        return json.dumps({"counted": "tied embeddings once"})
    options = deciding(row)
    if _OF_RATIOS not in row.metric:
        options = {key: value for key, value in options.items() if not key.startswith(_OF_RATIOS)}
    return json.dumps(options, sort_keys=True)


def columns_of(entries: Iterable[Entry], figure: Callable[[MetricRow], str | None]) -> dict[str, list[MetricRow]]:
    """The figures of each column, one of each checkpoint: that of the newest run. figure: names the column, None: not
    shown. Of one name under several protocols there are several columns, which are numbered; averages come last."""
    found: dict[tuple[str, str], dict[str, MetricRow]] = {}
    for entry in entries:
        for row in entry.metrics:
            if (heading := figure(row)) is not None:
                found.setdefault((heading, identity(row)), {}).setdefault(row.checkpoint_key, row)
    several = Counter(heading for heading, _ in found)
    numbers: Counter[str] = Counter()
    columns: dict[str, list[MetricRow]] = {}
    for (heading, _), rows in sorted(found.items(), key=lambda item: "average" in item[0][0]):
        numbers[heading] += 1
        columns[f"{heading} [{numbers[heading]}]" if several[heading] > 1 else heading] = list(rows.values())
    return columns


def calibration_of(entry: Entry) -> dict[str, Any]:
    """The windows of the first step that read any, {} if none did."""
    for place in sorted(entry.plugins()):
        start = f"steps.{place}.calibration."
        if found := {
            path.removeprefix(start): value for path, value in entry.options.items() if path.startswith(start)
        }:
            return found
    return {}


def calibration_name(entry: Entry) -> str:
    """E.g. "allenai/c4 256 x 2048, seed 0"."""
    found = calibration_of(entry)
    if not found:
        return ""
    data = found.get("data")
    name = data.get("dataset") if isinstance(data, Mapping) else data
    return f"{name} {found.get('num_samples')} x {found.get('seq_len')}, seed {found.get('seed')}"


def section_lines(entries: Sequence[Entry], columns: Mapping[str, Sequence[MetricRow]]) -> Iterator[str]:
    """The model, every calibration set, the protocol of every column, data, versions, warnings and runs."""
    yield model_line(entries)
    for options in dict.fromkeys(in_one_line(calibration_of(entry)) for entry in entries):
        if options:
            yield f"calibration: {options}"
    yield from figure_lines(columns)
    yield f"runs: {', '.join(runs_of(entries, columns))}"


def model_line(entries: Sequence[Entry]) -> str:
    """The model of the entries, which have one."""
    model = {
        path.removeprefix("model."): value for path, value in entries[0].options.items() if path.startswith("model.")
    }
    return f"model: {in_one_line(model)}"


def figure_lines(columns: Mapping[str, Sequence[MetricRow]]) -> Iterator[str]:
    """The same with the warnings."""
    yield from column_lines(columns)
    yield from warnings_of([row for rows in columns.values() for row in rows])


def column_lines(columns: Mapping[str, Sequence[MetricRow]]) -> Iterator[str]:
    """The protocol of every column by its heading, then data and versions."""
    for protocol, headings in _by_protocol(columns).items():
        yield f"{', '.join(headings)}: {protocol}"
    metrics = [row for rows in columns.values() for row in rows]
    protocols = [json.loads(row.protocol) for row in metrics]
    data = dict.fromkeys(source_of(one) for protocol in protocols for one in protocol.get("data_identity", ()))
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in protocol.get("versions", {}).items()) for protocol in protocols
    )
    for topic, texts in {"data": data, "versions": versions}.items():
        if shown := " / ".join(filter(None, texts)):
            yield f"{topic}: {shown}"


def runs_of(entries: Sequence[Entry], columns: Mapping[str, Sequence[MetricRow]]) -> list[str]:
    """Names of the runs that have the figures; without any column, those that have the entries."""
    runs = {key: name for entry in entries for key, name in entry.runs.items()}
    return sorted({runs[row.run_key] for rows in columns.values() for row in rows} or set(runs.values()))


def _by_protocol(columns: Mapping[str, Sequence[MetricRow]]) -> dict[str, list[str]]:
    """The headings of the columns by what decides about their figures; how many windows there were is left out."""
    found: dict[str, list[str]] = {}
    for heading, rows in columns.items():
        found.setdefault(in_one_line(json.loads(identity(rows[0]))), []).append(heading)
    return found
