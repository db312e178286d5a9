"""`slimline ui`, `slimline serve`, `slimline automations`: what goes on running."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.app import Overrides, app, prepared
from flows.errors import SpecError
from flows.runtime.interrupts import until_stopped
from flows.runtime.prefect_access import check_prefect, import_prefect
from flows.runtime.prefect_database import check_database

PrefectPort = Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect's pages.")]


@app.command()
def ui(
    prefect_port: PrefectPort = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's pages.")] = 5000,
) -> None:
    """Open Prefect's and MLflow's pages on this machine; Ctrl-C or SIGTERM ends them."""
    settings = prepared()
    import_prefect()
    check_database()
    from flows.runtime.servers import serve_pages

    with until_stopped():
        serve_pages(settings, prefect_port=prefect_port, mlflow_port=mlflow_port)


@app.command()
def serve(
    specs: Annotated[
        list[str],
        typer.Argument(metavar="SPEC", help="YAML files or names of shipped nights and specs, nights first."),
    ],
    cron: Annotated[str | None, typer.Option(help="When to run, e.g. '0 2 * * *'.")] = None,
    interval: Annotated[float | None, typer.Option(metavar="SECONDS", help="Or: run every so many seconds.")] = None,
    timezone: Annotated[str, typer.Option(help="Time zone of --cron, e.g. Europe/Berlin.")] = "UTC",
    name: Annotated[str | None, typer.Option(help="Name of the deployment. Default: that of the spec.")] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Keep the schedule paused until it is resumed.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Flow runs at the same time.")] = 1,
    set_: Overrides = [],
    prefect_port: PrefectPort = 4200,
) -> None:
    """Run nights and specs on a schedule. Starts a Prefect server on this machine unless PREFECT_API_URL names one."""
    prepared()
    import_prefect()
    from flows.serve.schedule import Timetable, serve_specs

    timetable = Timetable(cron, interval, timezone)
    with until_stopped():
        serve_specs(specs, timetable, overrides=set_, name=name, paused=paused, limit=limit, prefect_port=prefect_port)


@app.command()
def automations(
    after: Annotated[
        float, typer.Option(metavar="SECONDS", min=60, max=86_400, help="How long a flow run may give no sign of life.")
    ] = 300,
) -> None:
    """Have the Prefect server mark flow runs as crashed whose process was killed (slimline serve does this too)."""
    prepared()
    check_prefect()
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise SpecError("there is no Prefect server to tell; set PREFECT_API_URL, or use slimline serve")
    from flows.serve.automations import ensure_zombie_automation

    changed = ensure_zombie_automation(after)
    print("the server has a new or changed automation" if changed else "the server has the automation already")
