"""Which run or night is to be followed."""

from __future__ import annotations

from flows.errors import SpecError
from flows.records.lookup import recorded_runs
from infra.registry import did_you_mean
from infra.results.rows import NightRow, RunRow
from infra.results.store import ResultsStore
from infra.running.files import FollowedRun, RunningFiles


def find_followed(files: RunningFiles, results: ResultsStore, name: str | None) -> FollowedRun | RunRow | NightRow:
    """The newest that runs, or else ran, of that key, name or night id; without a name the newest that runs. One that
    ran before such things were noted is found in the results store.

    Raises SpecError if nothing runs, or nothing is called so (with the nearest name).
    """
    known = files.runs()
    running = [run for run in known if files.is_alive(run)]
    if name is None:
        return _newest(running, files)
    for run in (*reversed(running), *reversed(known)):
        if name in (run.key, run.name):
            return run
    recorded: list[RunRow | NightRow] = [*recorded_runs(results), *results.nights()]
    for row in reversed(recorded):
        if name in (row.name, row.night_id if isinstance(row, NightRow) else row.run_key):
            return row
    names = sorted({run.name for run in known} | {row.name for row in recorded})
    there = f"there are: {', '.join(names)}" if names else f"nothing has run in {files.folder.parent} yet"
    raise SpecError(f"no run or night {name!r}{did_you_mean(name, names)}; {there}")


def _newest(running: list[FollowedRun], files: RunningFiles) -> FollowedRun:
    """The night, rather than one of its cells."""
    ids = {run.id for run in running}
    whole = [run for run in running if run.part_of not in ids]
    if not whole:
        raise SpecError(
            f"nothing is running in {files.folder.parent} (a run begins when its spec has been looked through); "
            "start one in another terminal: slimline run demo; or name one that ended: slimline watch demo"
        )
    return whole[-1]
