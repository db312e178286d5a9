"""Part `night`: what a night costs beside the work itself. Twelve cells of the tiny model, from the command line."""

from __future__ import annotations

import json
import time

from flows.night.outcome import NightResult
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol
from tests.flows.home import Home

_NIGHT = "smoke"


def run(materials: Materials, options: Options) -> Result:
    """Stages run against distinct keys, seconds of orchestration per stage, and seconds of the same night cached."""
    home = Home(
        options.scratch / "night" / "home", variables={"PREFECT_HOME": str(options.scratch / "night" / "prefect")}
    )
    home.folder.mkdir(parents=True)
    home.child("plan", _NIGHT)  # builds the offline default
    # one cell at a time: where several overlap, waiting for one another would count as work
    first, _ = _night(Home(home.folder, variables=home.variables | {"SLIMLINE_RUNNER_WORKERS": "1"}))
    _, cached_seconds = _night(home)
    ran = [stage for cell in first.cells for stage in cell.stages if stage.status == "completed"]
    work = sum(stage.seconds or 0.0 for stage in ran)
    figures = Figures(
        night_cells=len(first.cells),
        night_stages_run=len(ran),
        night_distinct_keys=len(first.stages),
        night_seconds=first.seconds,
        night_stage_seconds=work,
        night_overhead_seconds_per_stage=(first.seconds - work) / sum(len(cell.stages) for cell in first.cells),
        night_overhead_seconds_per_stage_run=(first.seconds - work) / len(ran),
        night_cached_seconds=cached_seconds,
    )
    details = (
        "shipped night `smoke`, first one cell at a time, then the whole command once more",
        "temporary Prefect server, MLflow on SQLite",
    )
    return Result("night", protocol(options, *details), figures)


def _night(home: Home) -> tuple[NightResult, float]:
    started = time.monotonic()
    child = home.child("nightly", _NIGHT, "--json")
    return NightResult.model_validate(json.loads(child.stdout.splitlines()[-1])), time.monotonic() - started
