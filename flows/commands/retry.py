"""`slimline retry`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flows.commands.app import AsJson, Refresh, Runner, app, prepared
from flows.commands.nights import run_night
from flows.commands.runs import run_spec


@app.command()
def retry(
    recorded: Annotated[
        str, typer.Argument(metavar="RUN", help="Key or name of a run (its newest), or id or name of a night.")
    ],
    refresh: Refresh = [],
    runner: Runner = None,
    as_json: AsJson = False,
) -> None:
    """Run a recorded run or night again from its recorded spec: only what failed or is missing is run."""
    settings = prepared()
    from flows.records.lookup import find_recorded
    from flows.spec.load import parse_night, parse_spec
    from infra.results.rows import NightRow
    from infra.results.store import ResultsStore

    row = find_recorded(ResultsStore.of(settings), recorded)
    spec = json.loads(row.spec)
    if isinstance(row, NightRow):
        night = parse_night(spec, source=f"the recorded spec of {row.night_id}")
        run_night(night, settings, refresh=refresh, runner=runner, as_json=as_json)
    else:
        loaded = parse_spec(spec, source=f"the recorded spec of {row.run_key}")
        run_spec(loaded, settings, refresh=refresh, runner=runner, as_json=as_json)
