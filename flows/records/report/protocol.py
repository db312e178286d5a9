"""How the figures of a section were taken, in lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
    model = {
        path.removeprefix("model."): value for path, value in entries[0].options.items() if path.startswith("model.")
    }
    yield f"model: {in_one_line(model)}"
    for options in dict.fromkeys(in_one_line(calibration_of(entry)) for entry in entries):
        if options:
            yield f"calibration: {options}"
    yield from column_lines(columns)
    metrics = [row for rows in columns.values() for row in rows]
    yield from warnings_of(metrics)
    runs = {key: name for entry in entries for key, name in entry.runs.items()}
    yield f"runs: {', '.join(sorted({runs[row.run_key] for row in metrics}))}"


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


def _by_protocol(columns: Mapping[str, Sequence[MetricRow]]) -> dict[str, list[str]]:
    """The headings of the columns by what decides about their figures; how many windows there were is left out."""
    found: dict[str, list[str]] = {}
    for heading, rows in columns.items():
        found.setdefault(in_one_line(json.loads(identity(rows[0]))), []).append(heading)
    return found
