"""The leaderboard for a terminal: every checkpoint of the newest runs, with the best of each budget marked.

A table holds what can be compared: one model, one perplexity, one protocol. In it a checkpoint stands once, also if
several specs measured it. Times in milliseconds were taken apart and get no mark; their ratio to the dense model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flows.errors import SpecError
from flows.records.render import aligned_table
from flows.records.tables import LARGE
from infra.results.store import ResultsStore

_QUESTION = """
SELECT spec, checkpoint, checkpoint_key, model, coalesce(sparsity_asked, sparsity), sparsity, num_parameters,
    ppl_of, ppl, ppl_alike, zero_shot_avg, concat(zero_shot_tasks, ' ', zero_shot_alike), latency_ratio, latency_ms,
    decode_ms_per_token, peak_memory_gib, profile_alike, status = 'failed'
FROM (SELECT *, row_number() OVER () AS place FROM leaderboard)
ORDER BY finished_at DESC, place
"""


class Entry(NamedTuple):
    """A checkpoint as one spec measured it, in the order of the columns of the question; `..._protocol` is the same
    where figures were taken alike. budget: the share that was to go, in [0, 1]."""

    spec: str
    checkpoint: str
    checkpoint_key: str
    model: str | None
    budget: float | None
    sparsity: float | None
    num_parameters: int | None
    ppl_of: str | None
    ppl: float | None
    ppl_protocol: int | None
    zero_shot: float | None
    zero_shot_protocol: str | None
    latency_ratio: float | None
    latency_ms: float | None
    decode_ms: float | None
    peak_gib: float | None
    profile_protocol: int | None
    failed: bool

    @property
    def removed(self) -> str | None:
        """The share that is gone, or else (in whole per cent) was to go."""
        if self.sparsity is not None:
            return f"{self.sparsity:.1%}"
        return None if self.budget is None else f"{self.budget:.0%}"


@dataclass(frozen=True)
class _Column:
    """better: max or min of what can be compared, by `protocol`; None for what gets no mark."""

    heading: str
    field: str
    show: Callable[[Any], str]
    better: Callable[..., float] | None = None
    protocol: str = ""


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if not math.isfinite(value) or value < LARGE else f"{value:.3g}"


_COLUMNS = (
    _Column("removed", "removed", str),
    _Column("parameters (M)", "num_parameters", lambda value: f"{value / 1e6:.2f}"),
    _Column("ppl", "ppl", _perplexity, min, "ppl_protocol"),
    _Column("zero-shot acc", "zero_shot", "{:.3f}".format, max, "zero_shot_protocol"),
    _Column("latency / dense", "latency_ratio", "{:.3f}".format, min, "profile_protocol"),
    _Column("peak GiB", "peak_gib", "{:.2f}".format, min, "profile_protocol"),
    _Column("ms/token", "decode_ms", "{:.2f}".format),
    _Column("latency ms", "latency_ms", "{:.0f}".format),
)
_LONGEST_NAME = 48
#: what is left out first where there is no room
_DISPENSABLE = (
    *("latency ms", "ms/token", "spec", "peak GiB", "parameters (M)", "latency / dense"),
    *("zero-shot acc", "removed"),
)
#: of one of these that another spec measured, all go together
_MEASURED = (
    ("zero_shot", "zero_shot_protocol"),
    ("latency_ratio", "latency_ms", "decode_ms", "peak_gib", "profile_protocol"),
    ("num_parameters", "sparsity"),
)


def leaderboard(results: ResultsStore, *, width: int | None = None, bold: bool = False) -> str:
    """The tables with what they mean. width: characters of a line, beyond which columns are left out, those that matter
    least first; None: all. bold: mark the best by the terminal's bold letters too, not only by "*".

    Raises SpecError if nothing is recorded.
    """
    found = entries(results)
    if not found:
        raise SpecError(f"there are no results in {results.path} yet; run a spec first: slimline run demo")
    parts = [_section(title, rows, width, bold) for title, rows in _sections(found).items()]
    failed = dict.fromkeys(entry.spec for entry in found if entry.failed)
    notes = ["* best of those with as much removed, where the figure was taken under the same protocol"]
    notes += [f"{spec}: in its newest run a stage failed" for spec in failed]
    notes += ["one run with its protocol: slimline results --run SPEC; the newest one: slimline results --format table"]
    return "\n\n".join([*parts, "\n".join(notes)])


def entries(results: ResultsStore) -> list[Entry]:
    """Every checkpoint of the newest runs, the newest run first."""
    return [Entry(*row) for row in results.select(_QUESTION).rows]


def _sections(entries: Sequence[Entry]) -> dict[tuple[str, str, int | None], list[Entry]]:
    """By model, perplexity and its protocol, those that most checkpoints have first; what has no perplexity last."""
    measured = {entry.checkpoint_key for entry in entries if entry.ppl is not None}
    of_checkpoint: dict[str, list[Entry]] = {}
    for entry in entries:
        of_checkpoint.setdefault(entry.checkpoint_key, []).append(entry)
    found: dict[tuple[str, str, int | None], dict[str, Entry]] = {}
    for entry in entries:
        if entry.ppl is None and entry.checkpoint_key in measured:
            continue
        section = found.setdefault((entry.model or "unknown model", entry.ppl_of or "", entry.ppl_protocol), {})
        if entry.checkpoint_key not in section:
            section[entry.checkpoint_key] = _filled(entry, of_checkpoint[entry.checkpoint_key])
    models = {title[0]: place for place, title in enumerate(reversed(found))}
    order = sorted(found, key=lambda title: (-models[title[0]], title[1] == "", -len(found[title])))
    return {title: sorted(found[title].values(), key=_place) for title in order}


def _filled(entry: Entry, others: Iterable[Entry]) -> Entry:
    """What it lacks as another spec measured it of the same checkpoint, the newest first."""
    for fields in _MEASURED:
        if all(getattr(entry, field) is None for field in fields[:-1]):
            known = (other for other in others if getattr(other, fields[0]) is not None)
            if other := next(known, None):
                entry = entry._replace(**{field: getattr(other, field) for field in fields})
    return entry


def _place(entry: Entry) -> tuple[float, bool, float, str]:
    ppl = math.inf if entry.ppl is None or math.isnan(entry.ppl) else entry.ppl
    return _budget(entry), entry.ppl is None, ppl, entry.checkpoint


def _budget(entry: Entry) -> float:
    return 0.0 if entry.budget is None else round(entry.budget, 3)


def _section(title: tuple[str, str, int | None], entries: Sequence[Entry], width: int | None, bold: bool) -> str:
    model, ppl_of, _ = title
    columns = [each for each in _COLUMNS if any(getattr(entry, each.field) is not None for entry in entries)]
    marked = {(row, 2 + place) for place, column in enumerate(columns) for row in _best(column, entries)}
    rows = []
    for row, entry in enumerate(entries):
        values = [getattr(entry, column.field) for column in columns]
        figures = [
            "" if value is None else f"{column.show(value)}{'*' if (row, 2 + place) in marked else ' '}"
            for place, (column, value) in enumerate(zip(columns, values, strict=True))
        ]
        rows.append([_short(entry.checkpoint), _short(entry.spec), *figures])
    headings = ["checkpoint", "spec", *(f"{column.heading} " for column in columns)]
    kept = _fitting(headings, rows, width)
    table = aligned_table(
        [headings[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        [place > 1 for place in kept],
        bold={(row, kept.index(place)) for row, place in marked if place in kept} if bold else (),
    )
    left_out = [headings[place].strip() for place in range(len(headings)) if place not in kept]
    words = [f"{model}{f', ppl is {ppl_of}' if ppl_of else ''}", table]
    return "\n".join([*words, *([f"(no room for: {', '.join(left_out)})"] if left_out else [])])


def _best(column: _Column, entries: Sequence[Entry]) -> list[int]:
    """The rows that none with their budget and protocol betters, where one of those is worse. NaN is never good."""
    if column.better is None:
        return []
    groups: dict[tuple[float, Any], dict[int, float]] = {}
    for row, entry in enumerate(entries):
        value = getattr(entry, column.field)
        if value is not None and not math.isnan(value) and _budget(entry) > 0:
            groups.setdefault((_budget(entry), getattr(entry, column.protocol)), {})[row] = value
    marked = []
    for values in groups.values():
        best = column.better(values.values())
        if len(set(values.values())) > 1:
            marked += [row for row, value in values.items() if value == best]
    return marked


def _fitting(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """Places of the columns that fit; checkpoint and perplexity always stay."""
    kept = list(range(len(headings)))
    widths = [max(map(len, column)) + 2 for column in zip(headings, *rows, strict=True)]
    names = [heading.strip() for heading in headings]
    for name in _DISPENSABLE:
        if width is None or sum(widths[each] for each in kept) - 2 <= width:
            break
        if name in names:
            kept.remove(names.index(name))
    return kept


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
