"""`slimline watch`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.app import app, prepared

if TYPE_CHECKING:
    from infra.results.rows import NightRow, RunRow


@app.command()
def watch(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Key or spec name of a run, name or id of a night; default: the newest."),
    ] = None,
) -> None:
    """Follow a running run or night until it ends, and end with its exit code; Ctrl-C leaves it alone."""
    settings = prepared()
    from flows.watch.find import find_followed
    from flows.watch.forecast import recorded_timings
    from flows.watch.screen import follow
    from flows.watch.state import Watcher
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore
    from infra.running.files import FollowedRun, RunningFiles

    files, results = RunningFiles(settings.home), ResultsStore.of(settings)
    found = find_followed(files, results, run)
    if not isinstance(found, FollowedRun):
        raise typer.Exit(_say_recorded(found))
    try:
        code = follow(
            Watcher(files, ArtifactStore(settings.store_root), recorded_timings(results)),
            found,
            partial(print, flush=True),
        )
    except KeyboardInterrupt:
        print("not watching any longer; what ran still runs")
        code = _INTERRUPTED
    raise typer.Exit(code)


#: what shells say of a program that Ctrl-C ended
_INTERRUPTED = 130


def _say_recorded(row: RunRow | NightRow) -> int:
    """Say how it ended; returns the exit code of its command, as far as the record tells it."""
    from infra.results.rows import NightRow

    bad_gates = isinstance(row, NightRow) and not row.gates_passed
    told = "completed, but a gate does not hold" if bad_gates and row.status == "completed" else row.status
    print(f"{row.name} is not running; it ended at {row.finished_at:%Y-%m-%d %H:%M} UTC: {told}")
    return 1 if row.status == "failed" else 3 if bad_gates else 0
