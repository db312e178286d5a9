"""Which artifacts the store must keep: those of recorded runs, all of them or the newest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from flows.errors import SpecError
from flows.records.lookup import pick_run, recorded_runs
from infra.artifacts.store import ArtifactRef, Kind

if TYPE_CHECKING:
    from infra.results.rows import RunRow, StageRow
    from infra.results.store import ResultsStore

_KIND: TypeAdapter[Kind] = TypeAdapter(Kind)


def kept_artifacts(store: ResultsStore, *, keep_last: int | None, keep: Sequence[str] = ()) -> frozenset[ArtifactRef]:
    """The artifacts that kept runs need: of all their stages, finished or not.

    keep_last: the newest so many runs of each name, and the runs of the newest so many nights; None keeps all. keep:
    further runs, by key or name. Raises SpecError for an unknown one.
    """
    runs = recorded_runs(store)
    kept = {row.run_key for row in (runs if keep_last is None else _newest(runs, keep_last))}
    if keep_last is not None:
        kept |= _of_nights(store, keep_last) | {pick_run(runs, name).run_key for name in keep}
    return frozenset(_ref(stage) for stage in store.stages() if stage.run_key in kept)


def finished_artifacts(store: ResultsStore, run_key: str) -> tuple[ArtifactRef, ...]:
    """The artifacts of the completed and cached stages of a run."""
    stages = store.stages(run_key)
    return tuple(dict.fromkeys(_ref(stage) for stage in stages if stage.status in ("completed", "cached")))


def check_kept(store: ResultsStore, *, keep_last: int | None, keep: Sequence[str], delete: bool) -> None:
    """Raise SpecError for options that contradict each other, and for deleting all since nothing is recorded."""
    if keep and keep_last is None:
        raise SpecError("--keep adds to --keep-last, and without it every recorded run is kept; add e.g. --keep-last 0")
    if delete and keep_last is None and not store.runs():
        raise SpecError(
            f"no run is recorded in {store.path}, so nothing would be kept; check SLIMLINE_RESULTS_DB, or add "
            "--keep-last 0 if that is what you want"
        )
    if delete and (problems := store.problems()):
        raise SpecError(f"{problems[0]}; nothing is deleted, since what that run needs is not known")


def _ref(stage: StageRow) -> ArtifactRef:
    return ArtifactRef(kind=_KIND.validate_python(stage.kind), key=stage.stage_key)


def _newest(runs: Sequence[RunRow], number: int) -> list[RunRow]:
    by_name: dict[str, list[RunRow]] = defaultdict(list)
    for row in runs:
        by_name[row.name].append(row)
    return [row for rows in by_name.values() for row in rows[max(0, len(rows) - number) :]]


def _of_nights(store: ResultsStore, number: int) -> set[str]:
    nights = store.nights()
    newest = nights[max(0, len(nights) - number) :]
    cells = (cell for night in newest for cell in store.night_cells(night.night_id))
    return {cell.run_key for cell in cells if cell.run_key is not None}
