"""Finding a recorded run or night by what a user calls it: its key or id, or the name of its spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flows.errors import SpecError
from infra.registry import did_you_mean
from infra.tracking.pages import address_of_run

if TYPE_CHECKING:
    from infra.results.rows import NightRow, RunRow
    from infra.results.store import ResultsStore


def find_run(store: ResultsStore, name: str | None = None) -> RunRow:
    """The run with that key, or the newest run of the spec of that name; without a name the newest of all.

    Raises SpecError if nothing is recorded yet, or none is called so (with the nearest name that is).
    """
    runs = recorded_runs(store)
    if not runs:
        raise SpecError(f"there are no results in {store.path} yet; run a spec first: slimline run demo")
    return pick_run(runs, name)


def find_recorded(store: ResultsStore, name: str) -> RunRow | NightRow:
    """The run of that key or the newest of that name, or else the night. Raises SpecError with the nearest name."""
    runs, nights = recorded_runs(store), store.nights()
    if any(name in (row.run_key, row.name) for row in runs):
        return pick_run(runs, name)
    for night in reversed(nights):
        if name in (night.night_id, night.name):
            return night
    if not runs and not nights:
        raise SpecError(f"there is nothing recorded in {store.path} yet; run a spec first: slimline run demo")
    names = sorted({row.name for row in runs} | {night.name for night in nights})
    close = did_you_mean(name, [*names, *(row.run_key for row in runs), *(row.night_id for row in nights)])
    raise SpecError(
        f"no run or night {name!r}{close}; there are: {', '.join(names)} (one that was killed is not recorded: "
        "give its command again)"
    )


def mlflow_pages(store: ResultsStore, tracking_uri: str) -> dict[str, str]:
    """Addresses of the pages of all recorded runs that are in MLflow, by run key."""
    return {row.run_key: address_of_run(tracking_uri, row.mlflow_run_id) for row in store.runs() if row.mlflow_run_id}


def find_night(store: ResultsStore, name: str) -> NightRow:
    """The night of that id, or the newest of that name. Raises SpecError with the nearest name."""
    nights = store.nights()
    if not nights:
        raise SpecError(f"there are no nights in {store.path} yet; run one first: slimline nightly smoke")
    for night in reversed(nights):
        if name in (night.night_id, night.name):
            return night
    names = sorted({night.name for night in nights})
    close = did_you_mean(name, [*names, *(night.night_id for night in nights)])
    raise SpecError(f"no night {name!r}{close}; there are: {', '.join(names)}")


def recorded_runs(store: ResultsStore) -> tuple[RunRow, ...]:
    """All recorded runs, the newest last."""
    return tuple(sorted(store.runs(), key=lambda row: row.finished_at))


def pick_run(runs: Sequence[RunRow], name: str | None) -> RunRow:
    """The same as `find_run` among these runs, the newest last."""
    for row in reversed(runs):
        if name in (None, row.run_key, row.name):
            return row
    names = sorted({row.name for row in runs})
    close = did_you_mean(str(name), [*names, *(row.run_key for row in runs)])
    raise SpecError(f"no run {name!r}{close}; there are: {', '.join(names)}")
