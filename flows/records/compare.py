"""Two recorded checkpoints beside each other on the same items: which, whether they may be, and what is significant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from evaluation.significance.verdicts import holm
from flows.errors import SpecError
from flows.records.lookup import pick_run, recorded_runs
from flows.records.protocol_diff import Versions, differences, other_versions
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import ArtifactMissing
from infra.registry import did_you_mean
from infra.results.rows import DENSE, MetricRow, PairRow, RunRow
from tasks.stages.pairs import Reports, beside, by_evaluation

if TYPE_CHECKING:
    from infra.results.store import ResultsStore

Verdict = Literal["same", "better", "worse", "noise"]


@dataclass(frozen=True)
class Side:
    """A measured checkpoint of a recorded run, its rows by suite."""

    run: RunRow
    checkpoint: str
    suites: Mapping[str, Sequence[MetricRow]]


@dataclass(frozen=True)
class Compared:
    """One figure of both sides. labels: what the sides are called. verdict: after Holm's correction over all rows.

    other_versions: the libraries that the two were measured with in different versions.
    """

    labels: tuple[str, str]
    row: PairRow
    verdict: Verdict
    other_versions: Versions


@dataclass(frozen=True)
class Comparison:
    """All figures; a sentence for each thing that could not be compared; the figures that have no samples.

    run: the first that was named. measured: one row of it for each evaluation compared, with the protocol.
    """

    rows: tuple[Compared, ...]
    problems: tuple[str, ...]
    without_samples: tuple[str, ...]
    run: RunRow
    measured: tuple[MetricRow, ...]


@dataclass(frozen=True)
class Question:
    """What to compare: RUN or RUN:CHECKPOINT; without `other`, checkpoints of one run with its dense one."""

    name: str
    other: str | None = None
    suite: str | None = None
    alpha: float = 0.05
    seed: int = 0


def compared(question: Question, results: ResultsStore, store: ArtifactStore) -> Comparison:
    """The answer. Raises SpecError if a run, checkpoint or suite is unknown, or nothing of it can be compared."""
    sides = list(_sides(question, results))
    _check_suite(question.suite, sides)
    reports = Reports(store)
    found: list[_Found] = []
    problems: list[str] = []
    bare: list[str] = []
    measured: dict[str, MetricRow] = {}
    for both in sides:
        for suite in [name for name in both[0].suites if name in both[1].suites and question.suite in (None, name)]:
            answer = _answer(suite, both, reports, store, question.seed)
            found += answer.found
            problems += answer.problems
            bare += answer.without_samples
            if answer.found:
                measured.setdefault(suite, both[0].suites[suite][0])
    problems = list(dict.fromkeys(problems))
    if not found:
        raise SpecError("nothing can be compared: " + ("; ".join(problems) or _nothing_common(sides)))
    return Comparison(
        rows=_judged(found, question.alpha),
        problems=tuple(problems),
        without_samples=tuple(dict.fromkeys(bare)),
        run=sides[0][0].run,
        measured=tuple(measured.values()),
    )


class _Found(NamedTuple):
    """A figure of both sides that is not judged yet."""

    labels: tuple[str, str]
    row: PairRow
    other_versions: Versions


class _Answer(NamedTuple):
    """Of one evaluation of two sides, what a comparison has of all."""

    found: Sequence[_Found] = ()
    problems: Sequence[str] = ()
    without_samples: Sequence[str] = ()


def _answer(suite: str, sides: tuple[Side, Side], reports: Reports, store: ArtifactStore, seed: int) -> _Answer:
    labels = _labels(*sides)
    try:
        _check_alike(suite, sides, labels)
        _check_samples(suite, sides, labels, reports, store)
        _check_reference(suite, sides, labels, store)
    except SpecError as error:
        return _Answer(problems=[str(error)])
    rows, others = (side.suites[suite] for side in sides)
    answer = beside(rows, others, reports, reference=labels[1], seed=seed)
    versions = other_versions(rows[0], others[0])
    bare = _without_samples(rows, others, answer.rows, answer.problems)
    if not (answer.rows or answer.problems or bare):
        return _Answer(problems=[f"{suite} of {labels[0]} and {labels[1]} has no figure in common"])
    return _Answer([_Found(labels, row, versions) for row in answer.rows], answer.problems, bare)


def _sides(question: Question, results: ResultsStore) -> Iterator[tuple[Side, Side]]:
    runs = recorded_runs(results)
    if not runs:
        raise SpecError(f"there are no results in {results.path} yet; run a spec first: slimline run demo")
    run, name = _named(question.name, runs)
    mine = _measured(run, results)
    if question.other is None:
        others = [name] if name else [each for each in mine if each != DENSE]
        if not others:
            raise SpecError(f"run {run.name} has measured no checkpoint but {DENSE}; name another run to compare with")
        for each in others:
            yield _side(run, each, mine), _side(run, DENSE, mine)
        return
    other_run, other_name = _named(question.other, runs)
    theirs = _measured(other_run, results)
    if name is None and other_name is None:
        common = [each for each in mine if each in theirs]
        if not common:
            raise SpecError(
                f"{run.name} and {other_run.name} have measured no checkpoint of the same name; name one of each: "
                f"{', '.join(f'{run.name}:{each}' for each in mine)} and "
                f"{', '.join(f'{other_run.name}:{each}' for each in theirs)}"
            )
        for each in common:
            yield _side(run, each, mine), _side(other_run, each, theirs)
        return
    wanted = [name] if name else list(mine)
    for each in wanted:
        reference = other_name or each
        if name or (run.run_key, each) != (other_run.run_key, reference):
            yield _side(run, each, mine), _side(other_run, reference, theirs)


def _named(name: str, runs: Sequence[RunRow]) -> tuple[RunRow, str | None]:
    """The run and the checkpoint, if one is named. Names of runs may have a colon too."""
    if any(name in (run.run_key, run.name) for run in runs) or ":" not in name:
        return pick_run(runs, name), None
    run, _, checkpoint = name.rpartition(":")
    return pick_run(runs, run), checkpoint


def _measured(run: RunRow, results: ResultsStore) -> dict[str, dict[str, list[MetricRow]]]:
    """Rows by checkpoint and suite."""
    found: dict[str, dict[str, list[MetricRow]]] = {}
    for (checkpoint, suite), rows in by_evaluation(results.metrics(run.run_key)).items():
        found.setdefault(checkpoint, {})[suite] = rows
    if not found:
        raise SpecError(f"run {run.run_key} has measured nothing that has samples; add an evaluation to its spec")
    return found


def _side(run: RunRow, checkpoint: str, measured: Mapping[str, Mapping[str, Sequence[MetricRow]]]) -> Side:
    if checkpoint not in measured:
        raise SpecError(
            f"run {run.name} has no measured checkpoint {checkpoint!r}{did_you_mean(checkpoint, measured)}; "
            f"it has: {', '.join(measured)}"
        )
    return Side(run, checkpoint, measured[checkpoint])


def _labels(mine: Side, theirs: Side) -> tuple[str, str]:
    """The checkpoints' names, with those of their runs if these differ."""
    if mine.run.run_key == theirs.run.run_key:
        return mine.checkpoint, theirs.checkpoint
    if mine.run.name == theirs.run.name:
        return f"{mine.run.run_key}:{mine.checkpoint}", f"{theirs.run.run_key}:{theirs.checkpoint}"
    return f"{mine.run.name}:{mine.checkpoint}", f"{theirs.run.name}:{theirs.checkpoint}"


def _check_suite(suite: str | None, sides: Sequence[tuple[Side, Side]]) -> None:
    known = sorted({name for pair in sides for side in pair for name in side.suites})
    if suite is not None and suite not in known:
        raise SpecError(f"--suite: no evaluation {suite!r}{did_you_mean(suite, known)}; there are: {', '.join(known)}")


def _check_alike(suite: str, sides: tuple[Side, Side], labels: tuple[str, str]) -> None:
    """Raise SpecError, which names the difference, if the protocols say that the two were not measured alike."""
    mine, theirs = (side.suites[suite][0] for side in sides)
    found = differences(mine, theirs)
    if found:
        raise _not_alike(suite, labels, "; ".join(found[:3]))


def _check_reference(suite: str, sides: tuple[Side, Side], labels: tuple[str, str], store: ArtifactStore) -> None:
    """Raise SpecError if the two were measured against different dense models. Both reports are in the store."""
    mine, theirs = (_dense_of(side.suites[suite][0].stage_key, store) for side in sides)
    if mine != theirs:
        raise _not_alike(suite, labels, "the dense model that they were measured against is another")


def _not_alike(suite: str, labels: tuple[str, str], difference: str) -> SpecError:
    return SpecError(
        f"{suite} of {labels[0]} and {labels[1]} was not measured alike: {difference}; "
        "measure one of them again as the other was"
    )


def _dense_of(stage_key: str, store: ArtifactStore) -> Any:
    """What a suite that compares with the dense model compared with; None of other suites."""
    return store.manifest(ArtifactRef(kind="report", key=stage_key)).request.get("reference")


def _check_samples(
    suite: str, sides: tuple[Side, Side], labels: tuple[str, str], reports: Reports, store: ArtifactStore
) -> None:
    """Raise SpecError, which says what makes them, if the samples of one side cannot be had."""
    for side, label in zip(sides, labels, strict=True):
        key = side.suites[suite][0].stage_key
        try:
            reports.read(key)
        except ArtifactMissing as error:
            if store.has(ArtifactRef(kind="report", key=key)):
                raise SpecError(
                    f"{suite} of {label} has no samples that can be read, as before they were kept; run spec "
                    f"{side.run.name} with --refresh evaluate:{suite}"
                ) from error
            raise SpecError(
                f"the samples of {suite} of {label} are no longer in the store (slimline gc collects them with the "
                f"report {key}); run spec {side.run.name} again"
            ) from error


def _without_samples(
    rows: Sequence[MetricRow], others: Sequence[MetricRow], pairs: Sequence[PairRow], problems: Sequence[str]
) -> list[str]:
    both = {(row.task, row.metric) for row in others}
    done = {f"{row.suite}/{row.task}/{row.metric}" for row in pairs} | {text.partition(": ")[0] for text in problems}
    names = [f"{row.suite}/{row.task}/{row.metric}" for row in rows if (row.task, row.metric) in both]
    return [name for name in names if name not in done]


def _nothing_common(sides: Sequence[tuple[Side, Side]]) -> str:
    mine, theirs = sides[0]
    labels = _labels(mine, theirs)
    return (
        f"{labels[0]} was measured by {', '.join(mine.suites)} and {labels[1]} by {', '.join(theirs.suites)}; "
        "they have no figures with samples in common"
    )


def _judged(found: Sequence[_Found], alpha: float) -> tuple[Compared, ...]:
    significant = holm([each.row.p_value for each in found], alpha)
    return tuple(
        Compared(each.labels, each.row, _verdict(each.row, differs), each.other_versions)
        for each, differs in zip(found, significant, strict=True)
    )


def _verdict(row: PairRow, differs: bool) -> Verdict:
    if row.difference == 0:
        return "same"
    if not differs:
        return "noise"
    return "better" if (row.difference > 0) == row.higher_is_better else "worse"
