"""Results as tables: one row per checkpoint, one column per figure, standard errors beside them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from flows.records.render import csv_table, markdown_table
from infra.results.rows import DENSE, CheckpointRow, MetricRow

#: which figure of the profile stands in the table, under which heading, divided by what
_PROFILE_COLUMNS = {
    "num_parameters": ("parameters (M)", 1e6),
    "num_decoder_parameters": ("decoder (M)", 1e6),
    "prefill_ms_p50": ("prefill ms", 1.0),
    "decode_ms_per_token_p50": ("decode ms/token", 1.0),
    "tokens_per_s": ("tokens/s", 1.0),
    "latency_ms_p50": ("latency ms", 1.0),
    "prefill_ratio": ("prefill / dense", 1.0),
    "decode_ratio": ("decode / dense", 1.0),
    "latency_ratio": ("latency / dense", 1.0),
    "peak_memory_gib": ("peak memory GiB", 1.0),
    "power_w": ("power W", 1.0),
    "out_of_memory": ("out of memory", 1.0),
    "file_bytes": ("file MiB", 2.0**20),
}
#: the first of them stand at the head of the table, and are known of checkpoints that were not profiled
_SIZES = ("num_parameters", "num_decoder_parameters")
#: of a point of a grid, whose task is "profile b1 p128 n32" and not "profile", only these
_GRID_COLUMNS = ("tokens_per_s", "latency_ms_p50", "latency_ratio", "peak_memory_gib", "power_w", "out_of_memory")
_MOST_DIGITS = 6
#: from here on (a perplexity of what is broken) three digits say enough
LARGE = 10_000
#: of several metrics of one task the first of these stands in the table; the results store has all of them
_PREFERRED = ("acc", "acc_norm", "exact_match", "f1", "score")

Table = list[dict[str, str]]


class Measured(Protocol):
    """What the text of a figure is made of."""

    @property
    def suite(self) -> str:
        """The evaluation."""

    @property
    def metric(self) -> str:
        """E.g. "ppl@1024"."""

    @property
    def value(self) -> float:
        """In the unit in which it is recorded."""

    @property
    def stderr(self) -> float | None:
        """None if it has none."""


def table_rows(metrics: Iterable[MetricRow]) -> Table:
    """One row per checkpoint, the dense one first; every row has the same columns."""
    shown = [row for row in metrics if heading(row) is not None]
    shown = _one_metric_per_task(shown)
    columns = _columns(shown)
    ordered = _in_order(shown, columns)
    rows: dict[str, dict[str, str]] = {name: {} for name in _checkpoints(shown)}
    for row in shown:
        rows[row.checkpoint][columns[row.suite, row.task, row.metric]] = cell(row)
    return [{"checkpoint": name} | {h: cells.get(h, "") for h in ordered} for name, cells in rows.items()]


def with_sizes(metrics: Sequence[MetricRow], checkpoints: Iterable[CheckpointRow]) -> list[MetricRow]:
    """The figures, and of measured checkpoints that were not profiled the number of parameters."""
    measured = {row.checkpoint for row in metrics}
    known = {(row.checkpoint, row.metric) for row in metrics if row.suite == "profile"}
    found = list(metrics)
    for checkpoint in checkpoints:
        for metric in _SIZES:
            size = getattr(checkpoint, metric)
            name = checkpoint.checkpoint
            if size is not None and name in measured and (name, metric) not in known:
                found.append(
                    MetricRow(
                        run_key=checkpoint.run_key,
                        checkpoint=name,
                        checkpoint_key=checkpoint.checkpoint_key,
                        stage_key=checkpoint.checkpoint_key,
                        suite="profile",
                        task="profile",
                        metric=metric,
                        value=size,
                        protocol="{}",
                    )
                )
    return found


def _checkpoints(rows: Iterable[MetricRow]) -> list[str]:
    """Dense, then the others in the order of the suite that measured most of them: one may measure only some."""
    measured: dict[str, list[str]] = {}
    for row in rows:
        if row.checkpoint not in measured.setdefault(row.suite, []):
            measured[row.suite].append(row.checkpoint)
    widest_first = sorted(measured.values(), key=len, reverse=True)
    return sorted(dict.fromkeys(chain.from_iterable(widest_first)), key=lambda name: name != DENSE)


def _in_order(rows: Sequence[MetricRow], columns: Mapping[tuple[str, str, str], str]) -> list[str]:
    """The headings: sizes, what suites measured as it comes, the rest of the profile, one grid point after another."""
    names, tasks = list(_PROFILE_COLUMNS), list(dict.fromkeys(row.task for row in rows))

    def place(row: MetricRow) -> tuple[int, int, int]:
        if row.suite != "profile":
            return (1, 0, 0)
        index = names.index(row.metric)
        return (0, 0, index) if index < len(_SIZES) else (2, tasks.index(row.task), index)

    return list(dict.fromkeys(columns[row.suite, row.task, row.metric] for row in sorted(rows, key=place)))


def render(metrics: Sequence[MetricRow], form: str) -> str:
    """`form`: "table" (aligned text) and "markdown" show the table; "json" and "csv" every metric with its protocol."""
    if form == "json":
        return json.dumps([plain(row) | {"protocol": json.loads(row.protocol)} for row in metrics])
    if form == "csv":
        return csv_table(list(MetricRow.model_fields), [plain(row) for row in metrics])
    rows = table_rows(metrics)
    if form == "markdown" and rows:
        return markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    return aligned(rows)


def plain(row: MetricRow) -> dict[str, Any]:
    """The row as JSON can hold it: infinity is the word."""
    return dict(json.loads(row.model_dump_json()))


def aligned(rows: Table, width: int = 120) -> str:
    """The table turned on its side, figures down and checkpoints across, however many figures.

    Checkpoints that do not fit into `width` characters come in further tables below.
    """
    if not rows:
        return "no results yet"
    headings = ["", *(heading for heading in rows[0] if heading != "checkpoint")]
    columns = [[row["checkpoint"], *(row[heading] or "-" for heading in headings[1:])] for row in rows]
    margin = max(map(len, headings))
    tables: list[list[list[str]]] = [[]]
    room = width - margin
    for column in columns:
        needed = 2 + max(map(len, column))
        if tables[-1] and needed > room:
            tables.append([])
            room = width - margin
        tables[-1].append([cell.rjust(needed) for cell in column])
        room -= needed
    sides = [heading.ljust(margin) for heading in headings]
    return "\n\n".join("\n".join("".join(line) for line in zip(sides, *table, strict=True)) for table in tables)


def protocol_lines(metrics: Iterable[MetricRow], spec: Mapping[str, Any]) -> list[str]:
    """One line each that says what was pruned, on which calibration text, what variants change, how each suite took its
    figures, from what data, and with which versions; and what `warnings_of` says."""
    metrics = list(metrics)
    inputs = {name: spec[name] for name in ("model", "calibration") if spec.get(name)}
    variants = {
        f"variant {name}": changes
        for step in spec.get("steps", ())
        for name, changes in step.get("variants", {}).items()
    }
    taken = [(row.suite, _protocol(row)) for row in metrics]
    suites = {f"{suite} of files" if "runtime" in protocol else suite: protocol for suite, protocol in taken}
    shared = [(protocol.pop("data_identity", []), protocol.pop("versions", {})) for protocol in suites.values()]
    topics = inputs | variants | suites
    lines = [f"{topic}: {in_one_line(options) or 'changes nothing'}" for topic, options in topics.items()]
    data = dict.fromkeys(source_of(identity) for identities, _ in shared for identity in identities)
    libraries = dict.fromkeys(", ".join(f"{name} {number}" for name, number in each.items()) for _, each in shared)
    texts = {"data": "; ".join(data), "versions": " / ".join(filter(None, libraries))}
    return lines + [f"{topic}: {text}" for topic, text in texts.items() if text] + warnings_of(metrics)


def warnings_of(metrics: Iterable[MetricRow]) -> list[str]:
    """One line for each overlap of what was trained on with what was measured, and the checkpoints whose figures that
    makes doubtful."""
    found: dict[str, dict[str, None]] = {}
    for row in metrics:
        for sentence in json.loads(row.protocol).get("leaks", ()):
            found.setdefault(sentence, {})[row.checkpoint] = None
    return [f"warning: {sentence} [{', '.join(names)}]" for sentence, names in found.items()]


def _protocol(row: MetricRow) -> dict[str, Any]:
    """How the figure was taken."""
    return {key: value for key, value in json.loads(row.protocol).items() if key != "leaks"}


def source_of(identity: Mapping[str, str]) -> str:
    """A data set's name, if it has one, and the beginning of what tells its content from any other."""
    name = identity.get("repo_id", "local data")
    return " ".join([name, *(f"{key} {value[:12]}" for key, value in identity.items() if key != "repo_id")])


def in_one_line(options: Mapping[str, object]) -> str:
    """Options that are given, each with its value as JSON."""
    given = ((key, _without_none(value)) for key, value in options.items() if value is not None)
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in given if value not in ([], {}))


def _without_none(value: object) -> object:
    """A data set has options of which most are None."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _one_metric_per_task(rows: list[MetricRow]) -> list[MetricRow]:
    best: dict[tuple[str, str, str], MetricRow] = {}
    kept: list[MetricRow] = []
    for row in rows:
        if row.metric not in _PREFERRED:
            kept.append(row)
            continue
        key = (row.checkpoint, row.suite, row.task)
        if key not in best or _PREFERRED.index(row.metric) < _PREFERRED.index(best[key].metric):
            best[key] = row
    wanted = {id(row) for row in best.values()} | {id(row) for row in kept}
    return [row for row in rows if id(row) in wanted]


def _columns(rows: Iterable[MetricRow]) -> dict[tuple[str, str, str], str]:
    """The heading of each (suite, task, metric); what two evaluations measured is told apart by their names."""
    asked = {(row.suite, row.task, row.metric): name for row in rows if (name := heading(row))}
    count = Counter(asked.values())
    return {key: f"{key[0]}: {name}" if count[name] > 1 else name for key, name in asked.items()}


def heading(row: MetricRow) -> str | None:
    """Of the column of a figure; None for one that no table shows."""
    if row.suite == "profile":
        if row.metric not in _PROFILE_COLUMNS or (row.task != "profile" and row.metric not in _GRID_COLUMNS):
            return None
        return f"{_PROFILE_COLUMNS[row.metric][0]}{row.task.removeprefix('profile')}"
    return f"{row.task} {row.metric}"


def cell(row: Measured) -> str:
    """The figure as text, with its standard error."""
    if row.suite == "profile":
        if row.metric == "out_of_memory":
            return "yes"
        value = row.value / scale(row)
        if row.stderr is not None:
            return f"{value:.3f} ± {row.stderr:.3f}"
        return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
    if LARGE <= abs(row.value) < math.inf:
        return f"{row.value:.3g}" + ("" if row.stderr is None else f" ± {row.stderr:.2g}")
    digits = _digits(row)
    error = "" if row.stderr is None else f" ± {row.stderr:.{digits}f}"
    return f"{row.value:.{digits}f}{error}"


def scale(row: Measured) -> float:
    """By what the figure is divided where it is shown, as its heading says."""
    return _PROFILE_COLUMNS[row.metric][1] if row.suite == "profile" else 1.0


def _digits(row: Measured) -> int:
    """Behind the point: at least so many that two digits of the standard error, or of a value without one, are seen."""
    usual = 2 if row.metric.startswith("ppl@") else 3
    smallest = abs(row.value) if row.stderr is None else row.stderr
    if not 0 < smallest < math.inf:
        return usual
    return min(_MOST_DIGITS, max(usual, 1 - math.floor(math.log10(smallest))))
