"""`slimline ui`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.app import app, prepared


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's pages.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's pages.")] = 5000,
) -> None:
    """Open Prefect's and MLflow's pages on this machine; Ctrl-C ends them."""
    settings = prepared()
    from flows.servers import serve_pages

    serve_pages(settings, prefect_port=prefect_port, mlflow_port=mlflow_port)
