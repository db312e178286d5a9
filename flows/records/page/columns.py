"""The figures of a page's checkpoints: a column for each name and protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from flows.records.page.checkpoints import Checkpoint
from flows.records.report.protocol import identity
from flows.records.tables import cell, heading, scale
from infra.results.rows import MetricRow
from infra.results.store import ResultsStore

#: a page with more figures has only those of the leaderboard
MOST_FIGURES = 200_000

_OF_PROFILE = ("latency_ms_p50", "decode_ms_per_token_p50", "latency_ratio", "peak_memory_gib")
_BOARD = f"metric LIKE 'ppl@%' OR (suite = 'profile' AND task = 'profile' AND metric IN {_OF_PROFILE})"
#: which the column of parameters shows already
_SIZES = ("num_parameters", "num_decoder_parameters")

Better = Literal["high", "low"]


@dataclass
class Column:
    """Numbers of one kind by the place of the checkpoint. board: whether the leaderboard shows it.

    values: in the unit of the heading; texts: as `slimline results` prints them. name: "suite/task/metric".
    """

    heading: str
    name: str
    better: Better | None
    board: bool
    values: dict[int, float] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    protocol: str | None = None
    example: MetricRow | None = None


class _Figure(NamedTuple):
    suite: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Figures:
    """Columns, and which of them a figure of a stage is in: by (stage key, task, metric).

    complete: False if there were too many, and only those of the leaderboard were read.
    """

    columns: tuple[Column, ...]
    places: Mapping[tuple[str, str, str], int]
    complete: bool


def read_figures(results: ResultsStore, keys: Sequence[str], checkpoints: Sequence[Checkpoint]) -> Figures:
    """The figures of these runs, which are named newest first: of one checkpoint and column that of the newest run."""
    among = "WHERE list_contains(?, run_key)"
    ((count,),) = results.select(f"SELECT count(*) FROM metrics {among}", (list(keys),)).rows
    complete = count <= MOST_FIGURES
    if not complete:
        among += f" AND ({_BOARD})"
    columns, by_kind = _columns(results, among, keys)
    places = {checkpoint.key: place for place, checkpoint in enumerate(checkpoints)}
    numbers = {id(column): number for number, column in enumerate(columns)}
    stages: dict[tuple[str, str, str], int] = {}
    question = (
        "SELECT checkpoint_key, stage_key, suite, task, metric, hash(protocol), value, stderr FROM metrics "
        f"{among} ORDER BY list_position(?, run_key), rowid"
    )
    for key, stage, suite, task, metric, kind, value, stderr in results.select(question, (list(keys), list(keys))).rows:
        column = by_kind.get((suite, task, metric, kind))
        place = places.get(key)
        if column is None or place is None:
            continue
        stages[stage, task, metric] = numbers[id(column)]
        if place not in column.values:
            assert column.example is not None, "a column of figures is made from one"
            figure = _Figure(suite, metric, value, stderr)
            shown = heading(column.example) is not None
            column.values[place] = value / scale(figure) if shown else value
            column.texts[place] = cell(figure) if shown else f"{value:.4g}"
    return Figures(tuple(columns), stages, complete)


def own_columns(checkpoints: Sequence[Checkpoint], figures: Figures) -> tuple[Column, ...]:
    """Columns that are no figures of an evaluation: sparsity, parameters, the means of the zero-shot tasks."""
    asked = Column("sparsity", "sparsity_asked", None, True)
    removed = Column("removed", "sparsity", None, True)
    parameters = Column("parameters (M)", "size/num_parameters", "low", True)
    for place, each in enumerate(checkpoints):
        share_asked = 0.0 if each.method is None else each.sparsity
        for column, share in ((asked, share_asked), (removed, each.removed)):
            if share is not None:
                column.values[place], column.texts[place] = share, f"{100 * share:.4g} %"
        if each.num_parameters is not None:
            parameters.values[place] = each.num_parameters / 1e6
            parameters.texts[place] = f"{each.num_parameters / 1e6:.2f}"
    means = _means(checkpoints, figures)
    return tuple(column for column in (asked, removed, parameters, *means) if column.values)


def _columns(
    results: ResultsStore, among: str, keys: Sequence[str]
) -> tuple[list[Column], dict[tuple[str, str, str, int], Column]]:
    """The columns, and the same by (suite, task, metric, hash of the protocol)."""
    names = list(MetricRow.model_fields)
    chosen = ", ".join(f"arg_min({name}, rowid)" for name in names)
    found = results.select(
        f"SELECT {chosen}, hash(protocol), min(rowid) AS place FROM metrics {among} "
        "GROUP BY suite, task, metric, protocol ORDER BY place",
        (list(keys),),
    )
    columns: dict[tuple[str, str, str, str], Column] = {}
    by_kind: dict[tuple[str, str, str, int], Column] = {}
    for *values, kind, _ in found.rows:
        row = MetricRow.model_validate(dict(zip(names, values, strict=True)))
        if row.suite == "profile" and row.metric in _SIZES:
            continue
        column = columns.setdefault((row.suite, row.task, row.metric, identity(row)), _column(row))
        by_kind[row.suite, row.task, row.metric, kind] = column
    _number(list(columns.values()))
    return list(columns.values()), by_kind


def _column(row: MetricRow) -> Column:
    board = row.metric.startswith("ppl@") or (row.task == "profile" and row.metric in _OF_PROFILE)
    text = heading(row) or f"{row.task} {row.metric}".removeprefix("profile ")
    name = f"{row.suite}/{row.task}/{row.metric}"
    return Column(text, name, _better(row), board, protocol=identity(row), example=row)


def _better(row: MetricRow) -> Better | None:
    if row.higher_is_better is not None:
        return "high" if row.higher_is_better else "low"
    return "low" if row.metric.startswith("ppl") else None


def _number(columns: Sequence[Column]) -> None:
    """Two of one heading are told apart by their evaluation, or by a number for their protocol."""
    by_heading = Counter((column.heading, column.name) for column in columns)
    of_several = {text for text in {column.heading for column in columns} if len(_names(columns, text)) > 1}
    numbers: Counter[tuple[str, str]] = Counter()
    for column in columns:
        key = (column.heading, column.name)
        numbers[key] += 1
        if column.heading in of_several:
            column.heading = f"{column.name.partition('/')[0]}: {column.heading}"
        if by_heading[key] > 1:
            column.heading = f"{column.heading} [{numbers[key]}]"


def _names(columns: Sequence[Column], text: str) -> set[str]:
    return {column.name for column in columns if column.heading == text}


def _means(checkpoints: Sequence[Checkpoint], figures: Figures) -> Iterator[Column]:
    """The zero-shot mean of the leaderboard, a column for each set of tasks and protocols that it is a mean of."""
    accuracies = [
        number
        for number, column in enumerate(figures.columns)
        if column.name.endswith(("/acc", "/acc_norm")) and column.name.partition("/")[0] != "mmlu"
    ]
    found: dict[tuple[Any, ...], Column] = {}
    for place, each in enumerate(checkpoints):
        if each.zero_shot_mean is None:
            continue
        of = tuple(number for number in accuracies if place in figures.columns[number].values)
        kind = (each.zero_shot_tasks, of)
        text = f"zero-shot mean ({each.zero_shot_tasks} tasks)"
        column = found.setdefault(kind, Column(text, "zero_shot_avg", "high", True))
        column.values[place], column.texts[place] = each.zero_shot_mean, f"{each.zero_shot_mean:.3f}"
    columns = list(found.values())
    _number(columns)
    yield from columns
