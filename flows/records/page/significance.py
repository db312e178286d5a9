"""The verdicts between two checkpoints of a page. What is significant is decided in flows/records/compare.py alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from flows.errors import SpecError
from flows.records.compare import ComparisonRequest, Side, Verdict, compare_sides, judged, measured_side
from flows.records.page.checkpoints import Checkpoint
from flows.records.page.columns import Figures
from infra.artifacts.store import ArtifactStore
from infra.results.rows import PairRow, RunRow
from infra.results.store import ResultsStore
from tasks.stages.pairs import Reports

#: recorded pairs; a page with more leaves them out
MOST_PAIRS = 100_000
#: each reads samples and resamples them, which takes half a second
MOST_TESTS = 30
#: of a larger page, no two checkpoints but those recorded beside each other are tested
MOST_TESTED_CHECKPOINTS = 40

ALPHA = 0.05


@dataclass(frozen=True)
class Verdicts:
    """One checkpoint beside another. checkpoint, reference: their places on the page.

    rows: the number of the figure's column, the pair, the verdict. problems: a sentence for each evaluation that
    cannot be compared. recorded: tested with all pairs of its run (as by `slimline compare RUN`), else by itself.
    """

    checkpoint: int
    reference: int
    rows: tuple[tuple[int, PairRow, Verdict], ...]
    problems: tuple[str, ...] = ()
    recorded: bool = True


def read_verdicts(
    results: ResultsStore,
    store: ArtifactStore,
    keys: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    figures: Figures,
) -> tuple[Verdicts, ...] | None:
    """Every checkpoint beside its dense one, as recorded; of a small page others beside each other, too, from their
    samples. None if there are too many pairs."""
    recorded = _recorded(results, keys, checkpoints, figures)
    if recorded is None:
        return None
    known = {frozenset((each.checkpoint, each.reference)) for each in recorded}
    return (*recorded, *_tested(results, store, keys, checkpoints, figures, known))


def _recorded(
    results: ResultsStore, keys: Sequence[str], checkpoints: Sequence[Checkpoint], figures: Figures
) -> list[Verdicts] | None:
    names = list(PairRow.model_fields)
    among = "WHERE list_contains(?, run_key)"
    ((count,),) = results.select(f"SELECT count(*) FROM pairs {among}", (list(keys),)).rows
    if count > MOST_PAIRS:
        return None
    question = f"SELECT {', '.join(names)} FROM pairs {among} ORDER BY list_position(?, run_key), rowid"
    by_run: dict[str, list[PairRow]] = {}
    for values in results.select(question, (list(keys), list(keys))).rows:
        row = PairRow.model_validate(dict(zip(names, values, strict=True)))
        by_run.setdefault(row.run_key, []).append(row)
    places = _places(results, keys, checkpoints)
    found: dict[tuple[int, int], dict[int, tuple[int, PairRow, Verdict]]] = {}
    for rows in by_run.values():
        for row, verdict in zip(rows, judged(rows, ALPHA), strict=True):
            both = tuple(places.get((row.run_key, name)) for name in (row.checkpoint, row.reference))
            number = figures.places.get((row.stage_key, row.task, row.metric))
            if number is not None and both[0] is not None and both[1] is not None:
                found.setdefault((both[0], both[1]), {}).setdefault(number, (number, row, verdict))
    return [Verdicts(mine, theirs, tuple(rows.values())) for (mine, theirs), rows in found.items()]


def _places(
    results: ResultsStore, keys: Sequence[str], checkpoints: Sequence[Checkpoint]
) -> dict[tuple[str, str], int]:
    """Where on the page a checkpoint of a run is, by the run's key and its name there."""
    by_key = {checkpoint.key: place for place, checkpoint in enumerate(checkpoints)}
    named = results.select(
        "SELECT run_key, checkpoint, checkpoint_key FROM checkpoints WHERE list_contains(?, run_key)", (list(keys),)
    )
    return {(run, name): by_key[key] for run, name, key in named.rows if key in by_key}


def _tested(
    results: ResultsStore,
    store: ArtifactStore,
    keys: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    figures: Figures,
    known: set[frozenset[int]],
) -> Iterator[Verdicts]:
    if len(checkpoints) > MOST_TESTED_CHECKPOINTS:
        return
    runs = {run.run_key: run for run in results.runs() if run.run_key in keys}
    sides = {place: side for place, each in enumerate(checkpoints) if (side := _side(results, runs, each))}
    pairs = [both for both in combinations(sides, 2) if frozenset(both) not in known]
    pairs = [both for both in pairs if checkpoints[both[0]].model == checkpoints[both[1]].model]
    # those of one size are compared most; of a checkpoint made from another the later one is the question
    pairs.sort(key=lambda both: checkpoints[both[0]].sparsity != checkpoints[both[1]].sparsity)
    reports = Reports(store)
    for reference, mine in pairs[:MOST_TESTS]:
        try:
            comparison = compare_sides(
                [(sides[mine], sides[reference])], ComparisonRequest("", alpha=ALPHA), store, reports
            )
        except SpecError as reason:
            yield Verdicts(mine, reference, (), (str(reason),), recorded=False)
            continue
        rows = [
            (figures.places.get((each.row.stage_key, each.row.task, each.row.metric)), each) for each in comparison.rows
        ]
        yield Verdicts(
            mine,
            reference,
            tuple((number, each.row, each.verdict) for number, each in rows if number is not None),
            comparison.problems,
            recorded=False,
        )


def _side(results: ResultsStore, runs: Mapping[str, RunRow], checkpoint: Checkpoint) -> Side | None:
    """As the newest run that measured it."""
    for key in checkpoint.runs:
        try:
            return measured_side(runs[key], _name_in(results, key, checkpoint), results)
        except SpecError:
            continue
    return None


def _name_in(results: ResultsStore, run_key: str, checkpoint: Checkpoint) -> str:
    """A checkpoint that several runs have may be called otherwise in each."""
    names = [row.checkpoint for row in results.checkpoints(run_key) if row.checkpoint_key == checkpoint.key]
    return names[0]
