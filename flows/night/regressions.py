"""The figures of a night compared with the last good one's, and the gates applied to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from evaluation.significance.verdicts import Figure, Judgement, judge
from flows.night.outcome import CellOutcome, GateOutcome
from flows.spec.night import Gate
from infra.errors import ArtifactMissing
from infra.results.rows import MetricRow, NightFigureRow
from tasks.stages.pairs import Reports, is_of

if TYPE_CHECKING:
    from evaluation.significance.paired import Paired

_FEWEST_ITEMS = 20
"""Of fewer items no paired test can show a difference beside many others: its p-value is at least 2 / 2^items."""

_FigureKey = tuple[str, str, str, str, str]
"""Cell, checkpoint, suite, task, metric: the same from night to night."""
_TestKey = tuple[str, str, str, str | None]
"""Stage key now, task, metric, stage key then: cells share stages, and a shared figure is tested once."""


def compare(
    night_id: str,
    cells: Sequence[CellOutcome],
    before: Iterable[NightFigureRow],
    reports: Reports,
    *,
    alpha: float,
    tolerance: float,
) -> tuple[NightFigureRow, ...]:
    """A row per figure of this night, then one for each that is gone. before: the figures of the last good night.

    A figure of the same stage with the same value was not measured again and is the same. Where the samples of both
    nights are in the store and are of the same items, the test is paired.
    """
    known = {_figure_key(row.cell, row): row for row in before if row.verdict != "gone"}
    pairs = [(cell.name, now, known.get(_figure_key(cell.name, now))) for cell in cells for now in cell.metrics]
    tests = {_test_key(now, then): (now, then) for _, now, then in pairs if not _same_measurement(now, then)}
    paired = _paired(tests, reports)
    answers = judge(
        [(_figure(now), _figure(then) if then else None) for now, then in tests.values()],
        alpha=alpha,
        tolerance=tolerance,
        paired=[paired[key].p_value if key in paired else None for key in tests],
    )
    judged = dict(zip(tests, answers, strict=True))
    rows = [_judged_row(night_id, cell, now, then, judged, paired) for cell, now, then in pairs]
    here = {_figure_key(row.cell, row) for row in rows}
    names = {cell.name for cell in cells}
    gone = [row for key, row in known.items() if key not in here and row.cell in names]
    return (*rows, *(_gone(night_id, row) for row in gone))


def pass_gates(
    gates: Iterable[Gate], figures: Sequence[NightFigureRow]
) -> tuple[tuple[NightFigureRow, ...], tuple[GateOutcome, ...]]:
    """The figures, each marked with what the gates that guard it demand, and the outcome of every gate."""
    outcomes: list[GateOutcome] = []
    problems: dict[int, list[str]] = {}
    for gate in gates:
        guarded = [
            index
            for index, row in enumerate(figures)
            if gate.guards(cell=row.cell, checkpoint=row.checkpoint, figure=f"{row.suite}/{row.task}/{row.metric}")
        ]
        found = {index: list(_gate_problems(gate, figures[index])) for index in guarded}
        for index, sentences in found.items():
            problems.setdefault(index, []).extend(sentences)
        unique = dict.fromkeys(sentence for sentences in found.values() for sentence in sentences)
        outcomes.append(GateOutcome(gate=gate.words, num_figures=len(guarded), problems=tuple(unique)))
    marked = tuple(
        row
        if index not in problems
        else row.model_copy(
            update={
                "gate": "failed" if problems[index] else "passed",
                "message": "; ".join(problems[index]) or row.message,
            }
        )
        for index, row in enumerate(figures)
    )
    return marked, tuple(outcomes)


def _gate_problems(gate: Gate, row: NightFigureRow) -> Iterator[str]:
    where = f"{row.cell} {row.checkpoint} {row.suite}/{row.task}/{row.metric}"
    if row.verdict == "gone":
        yield f"{where} is gone"
        return
    # written so that NaN fails
    if gate.at_most is not None and not row.value <= gate.at_most:
        yield f"{where} = {row.value:.4g}, more than {gate.at_most:g}"
    if gate.at_least is not None and not row.value >= gate.at_least:
        yield f"{where} = {row.value:.4g}, less than {gate.at_least:g}"
    if gate.not_worse and row.verdict == "worse":
        yield f"{where} = {row.value:.4g}, worse than {row.before_value:.4g} beyond noise"
    if gate.max_loss is not None and row.before_value is not None and not _loss(row) <= gate.max_loss:
        yield f"{where} = {row.value:.4g}, {_loss(row):.1%} worse than {row.before_value:.4g}"


def _loss(row: NightFigureRow) -> float:
    """How much worse than before, relative; negative if better."""
    assert row.before_value is not None
    if row.value == row.before_value:
        return 0.0
    loss = (row.before_value - row.value) if row.higher_is_better else (row.value - row.before_value)
    return loss / abs(row.before_value) if row.before_value else float("inf") * loss


def _paired(
    tests: Mapping[_TestKey, tuple[MetricRow, NightFigureRow | None]], reports: Reports
) -> dict[_TestKey, Paired]:
    """Paired tests of those whose samples are in the store for both nights."""
    stages = {(now.stage_key, then.stage_key) for now, then in tests.values() if then is not None}
    # a refreshed stage has replaced its samples
    known = {both: _pairs(both, reports) for both in sorted(stages) if both[0] != both[1]}
    found: dict[_TestKey, Paired] = {}
    for key, (now, then) in tests.items():
        pair = known.get((now.stage_key, then.stage_key), {}).get((now.task, now.metric)) if then else None
        if pair is not None and then is not None and is_of(pair, now.value, then.value):
            found[key] = pair
    return found


def _pairs(stages: tuple[str, str], reports: Reports) -> dict[tuple[str, str], Paired]:
    from evaluation.significance.paired import pair

    try:
        now, then = (reports.read(stage) for stage in stages)
    except ArtifactMissing:
        return {}
    averages = [average for average in now.averages if average in then.averages]
    found, _ = pair(now.samples, then.samples, averages=averages)
    return {(each.task, each.metric): each for each in found if each.num_items >= _FEWEST_ITEMS}


def _figure_key(cell: str, row: MetricRow | NightFigureRow) -> _FigureKey:
    return cell, row.checkpoint, row.suite, row.task, row.metric


def _test_key(now: MetricRow, then: NightFigureRow | None) -> _TestKey:
    return now.stage_key, now.task, now.metric, then.stage_key if then else None


def _same_measurement(now: MetricRow, then: NightFigureRow | None) -> bool:
    """Whether both are one measurement; a stage that was refreshed has the same key, and perhaps another value."""
    return then is not None and then.stage_key == now.stage_key and then.value == now.value


def _figure(row: MetricRow | NightFigureRow) -> Figure:
    assert row.higher_is_better is not None, "rows of a run that has just ended know their direction"
    return Figure(row.value, row.stderr, row.higher_is_better)


def _judged_row(
    night_id: str,
    cell: str,
    now: MetricRow,
    then: NightFigureRow | None,
    judged: Mapping[_TestKey, Judgement],
    paired: Mapping[_TestKey, Paired],
) -> NightFigureRow:
    key = _test_key(now, then)
    judgement = judged.get(key, Judgement("same"))
    tested = paired[key].test if key in paired else "z"
    copied = set(NightFigureRow.model_fields) & set(MetricRow.model_fields)
    return NightFigureRow(
        night_id=night_id,
        cell=cell,
        **now.model_dump(include=copied),
        before_value=then.value if then else None,
        before_stderr=then.stderr if then else None,
        before_stage_key=then.stage_key if then else None,
        p_value=judgement.p_value,
        test=None if judgement.p_value is None else tested,
        verdict=judgement.verdict,
    )


def _gone(night_id: str, row: NightFigureRow) -> NightFigureRow:
    """A figure that is gone keeps its last value."""
    return row.model_copy(
        update={
            "night_id": night_id,
            "before_value": row.value,
            "before_stderr": row.stderr,
            "before_stage_key": row.stage_key,
            "p_value": None,
            "test": None,
            "verdict": "gone",
            "gate": None,
            "message": None,
        }
    )
