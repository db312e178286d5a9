"""Two recorded checkpoints on the same items: which, whether they are comparable, and what differs significantly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
class ComparedFigure:
    """One figure of both sides. labels: what the sides are called. verdict: after Holm's correction over all rows.

    other_versions: the libraries that the two were measured with in different versions.
    """

    labels: tuple[str, str]
    row: PairRow
    verdict: Verdict
    other_versions: Versions


@dataclass(frozen=True)
class Comparison:
    """All figures, a sentence for each evaluation or figure that could not be compared, the figures without samples.

    run: the first that was named. measured: one row of it for each evaluation compared, with the protocol.
    """

    rows: tuple[ComparedFigure, ...]
    problems: tuple[str, ...]
    without_samples: tuple[str, ...]
    run: RunRow
    measured: tuple[MetricRow, ...]


@dataclass(frozen=True)
class ComparisonRequest:
    """What to compare: RUN or RUN:CHECKPOINT; without `other`, checkpoints of one run with its dense one.

    suite: only this evaluation. alpha: the chance of any false difference. seed: of the resampling.
    """

    name: str
    other: str | None = None
    suite: str | None = None
    alpha: float = 0.05
    seed: int = 0


def compare_checkpoints(request: ComparisonRequest, results: ResultsStore, store: ArtifactStore) -> Comparison:
    """Pair the figures and judge them. Raises SpecError if a run, checkpoint or suite is unknown, or nothing can be
    compared."""
    sides = list(_sides(request, results))
    _check_suite(request.suite, sides)
    return compare_sides(sides, request, store, Reports(store))


def compare_sides(
    sides: Sequence[tuple[Side, Side]], request: ComparisonRequest, store: ArtifactStore, reports: Reports
) -> Comparison:
    """The same for sides that were found. Raises SpecError if nothing of them can be compared."""
    paired: list[tuple[tuple[str, str], PairRow, Versions]] = []
    problems: list[str] = []
    without_samples: list[str] = []
    measured: dict[str, MetricRow] = {}
    for mine, theirs in sides:
        labels = _labels(mine, theirs)
        for suite in [name for name in mine.suites if name in theirs.suites and request.suite in (None, name)]:
            if reason := _why_not_comparable(suite, (mine, theirs), labels, reports, store):
                problems.append(reason)
                continue
            rows, others = mine.suites[suite], theirs.suites[suite]
            answer = beside(rows, others, reports, reference=labels[1], seed=request.seed)
            common = {(row.task, row.metric) for row in rows} & {(row.task, row.metric) for row in others}
            answered = {(row.task, row.metric) for row in answer.rows} | answer.problems.keys()
            if not (common or answered):
                problems.append(f"{suite} of {labels[0]} and {labels[1]} has no figure in common")
            problems += answer.problems.values()
            without_samples += [
                f"{row.suite}/{row.task}/{row.metric}" for row in rows if (row.task, row.metric) in common - answered
            ]
            paired += [(labels, row, other_versions(rows[0], others[0])) for row in answer.rows]
            if answer.rows:
                measured.setdefault(suite, rows[0])
    problems = list(dict.fromkeys(problems))
    if not paired:
        raise SpecError("nothing can be compared: " + ("; ".join(problems) or _nothing_common(sides)))
    verdicts = judged([row for _, row, _ in paired], request.alpha)
    return Comparison(
        rows=tuple(
            ComparedFigure(labels, row, verdict, versions)
            for (labels, row, versions), verdict in zip(paired, verdicts, strict=True)
        ),
        problems=tuple(problems),
        without_samples=tuple(dict.fromkeys(without_samples)),
        run=sides[0][0].run,
        measured=tuple(measured.values()),
    )


def judged(rows: Sequence[PairRow], alpha: float) -> tuple[Verdict, ...]:
    """The verdict on each, Holm-corrected over them all at level `alpha`."""
    significant = holm([row.p_value for row in rows], alpha)
    return tuple(_verdict(row, differs) for row, differs in zip(rows, significant, strict=True))


def measured_side(run: RunRow, checkpoint: str, results: ResultsStore) -> Side:
    """A checkpoint of a run. Raises SpecError if nothing that has samples was measured on it."""
    return _side(run, checkpoint, _measured(run, results))


def _sides(request: ComparisonRequest, results: ResultsStore) -> Iterator[tuple[Side, Side]]:
    runs = recorded_runs(results)
    if not runs:
        raise SpecError(f"there are no results in {results.path} yet; run a spec first: slimline run demo")
    run, name = _named(request.name, runs)
    mine = _measured(run, results)
    if request.other is None:
        others = [name] if name else [each for each in mine if each != DENSE]
        if not others:
            raise SpecError(f"run {run.name} has measured no checkpoint but {DENSE}; name another run to compare with")
        for each in others:
            yield _side(run, each, mine), _side(run, DENSE, mine)
        return
    other_run, other_name = _named(request.other, runs)
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
    measured: dict[str, dict[str, list[MetricRow]]] = {}
    for (checkpoint, suite), rows in by_evaluation(results.metrics(run.run_key)).items():
        measured.setdefault(checkpoint, {})[suite] = rows
    if not measured:
        raise SpecError(f"run {run.run_key} has measured nothing that has samples; add an evaluation to its spec")
    return measured


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


def _why_not_comparable(
    suite: str, sides: tuple[Side, Side], labels: tuple[str, str], reports: Reports, store: ArtifactStore
) -> str | None:
    """A sentence that says what to do, if the protocols differ, samples of one side cannot be had, or the two were
    measured against different dense models; None if they can be compared."""
    rows = [side.suites[suite][0] for side in sides]
    refs = [ArtifactRef(kind="report", key=row.stage_key) for row in rows]
    not_alike = f"{suite} of {labels[0]} and {labels[1]} was not measured alike: "
    way_out = "; measure one of them again as the other was"
    if different := differences(*rows):
        return not_alike + "; ".join(different[:3]) + way_out
    for side, label, ref in zip(sides, labels, refs, strict=True):
        try:
            reports.read(ref.key)
        except ArtifactMissing:
            if store.has(ref):
                return (
                    f"{suite} of {label} has no samples that can be read, as before they were kept; run spec "
                    f"{side.run.name} with --refresh evaluate:{suite}"
                )
            return (
                f"the samples of {suite} of {label} are no longer in the store (slimline gc collects them with the "
                f"report {ref.key}); run spec {side.run.name} again"
            )
    # only suites that compare with the dense model have a reference
    mine, theirs = (store.manifest(ref).request.get("reference") for ref in refs)
    if mine != theirs:
        return f"{not_alike}the dense model that they were measured against is another{way_out}"
    return None


def _nothing_common(sides: Sequence[tuple[Side, Side]]) -> str:
    mine, theirs = sides[0]
    labels = _labels(mine, theirs)
    return (
        f"{labels[0]} was measured by {', '.join(mine.suites)} and {labels[1]} by {', '.join(theirs.suites)}; "
        "they have no figures with samples in common"
    )


def _verdict(row: PairRow, differs: bool) -> Verdict:
    if row.difference == 0:
        return "same"
    if not differs:
        return "noise"
    return "better" if (row.difference > 0) == row.higher_is_better else "worse"
