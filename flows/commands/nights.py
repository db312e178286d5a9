"""`slimline nightly`, `slimline nights`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.app import AsJson, Overrides, Refresh, Runner, SpecName, app, prepared
from flows.errors import SpecError
from flows.runtime.interrupts import interruptible_command
from flows.runtime.prefect_access import reach_prefect
from flows.runtime.task_runners import check_runner
from infra.registry import did_you_mean

if TYPE_CHECKING:
    from flows.night.outcome import NightResult
    from flows.spec.night import NightSpec
    from infra.results.rows import NightRow
    from infra.results.store import ResultsStore
    from infra.settings import Settings


@app.command()
def nightly(
    spec: SpecName,
    set_: Overrides = [],
    refresh: Refresh = [],
    runner: Runner = None,
    as_json: AsJson = False,
) -> None:
    """Run every cell of a night's matrix, compare with the last good night, hold the gates.

    Exit codes: 0 good; 3 a gate does not hold; 1 or 2 a cell failed (2: all for reasons that you can mend).
    """
    settings = prepared()
    from flows.spec.load import load_night

    run_night(load_night(spec, set_), settings, refresh=refresh, runner=runner, as_json=as_json)


@app.command()
def nights(
    name: Annotated[str | None, typer.Argument(help="Name or id of a night; default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the nights, and print the page of the newest: what ran, what failed, what got better or worse."""
    settings = prepared()
    from infra.results.store import ResultsStore

    store = ResultsStore.of(settings)
    every = store.nights()
    if not every:
        raise SpecError(f"there are no nights in {settings.results_path} yet; run one first: slimline nightly smoke")
    found = [row for row in every if name in (None, row.name, row.night_id)]
    if not found:
        names = sorted({row.name for row in every})
        raise SpecError(f"no night {name!r}{did_you_mean(str(name), names)}; there are: {', '.join(names)}")
    for row in found:
        good = "good" if row.status == "completed" and row.gates_passed else "not good"
        counts = f"{row.num_stages} stages, {row.num_run} run, {row.num_cached} cached, {row.num_failed} failed"
        print(f"{row.night_id}  {row.finished_at:%Y-%m-%d %H:%M} UTC  {good}: {counts}")
    _print_page(store, found[-1], settings)
    if as_json:
        print(json.dumps([json.loads(row.model_dump_json()) for row in found]))


def _print_page(store: ResultsStore, night: NightRow, settings: Settings) -> None:
    """What got worse, what failed, what is new; the figures that say so; the cells with their runs."""
    from flows.night.headlines import headlines_of_record, place
    from flows.records.lookup import mlflow_pages
    from flows.records.render import printable

    cells, figures = store.night_cells(night.night_id), store.night_figures(night.night_id)
    print("\n" + "\n".join(map(printable, headlines_of_record(night, cells, figures))) + "\n")
    for figure in figures:
        if figure.verdict in ("better", "worse", "gone") or figure.gate == "failed":
            before = "" if figure.before_value is None else f", before {figure.before_value:.4g}"
            print(f"{figure.verdict:6} {place(figure)} = {figure.value:.4g}{before}")
    pages, width = mlflow_pages(store, settings.tracking_uri), max((len(row.cell) for row in cells), default=0)
    for row in cells:
        run = f"{row.run_key}  {pages.get(row.run_key, '')}" if row.run_key else ""
        print(f"{row.cell:{width}}  {row.status:9}  {run}".rstrip())
    if night.message:
        print(f"failed: {printable(night.message)}")


def run_night(
    night: NightSpec,
    settings: Settings,
    *,
    refresh: Sequence[str] = (),
    runner: str | None = None,
    as_json: bool = False,
) -> None:
    """Run a night from the command line and print what came out. Raises NightFailed after printing the rest.

    runner: where cells run, "threads", "dask" or "ray"; by default as the settings say.
    """
    chosen = check_runner(runner or settings.runner, settings)
    with interruptible_command():
        reach_prefect()
        from flows.night.nightly import on_runner
        from flows.night.outcome import NightFailed

        try:
            result = on_runner(chosen, settings)(night, (), refresh)
        except NightFailed as failed:
            _print(failed.result, as_json)
            raise
    _print(result, as_json)


def _print(result: NightResult, as_json: bool) -> None:
    from flows.night.summary import terminal

    print(terminal(result))
    if as_json:
        print(result.model_dump_json())
