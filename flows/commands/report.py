"""`slimline sql`, `slimline report`: questions to the results store, and the tables of the papers from it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flows.commands.app import app, prepared
from flows.commands.results import Form


@app.command()
def sql(
    question: Annotated[
        str,
        typer.Argument(metavar="SELECT", help='One SELECT (or SHOW TABLES, DESCRIBE runs); "-" reads it from stdin.'),
    ],
    form: Annotated[
        Form, typer.Option("--format", help="table cuts long cells; markdown, csv and json have all of them.")
    ] = Form.table,
) -> None:
    """Ask the results store a question in SQL; nothing can be changed by it."""
    settings = prepared()
    from flows.records.answers import render_answer
    from infra.results.store import ResultsStore

    answer = ResultsStore.of(settings).select(sys.stdin.read() if question == "-" else question)
    print(render_answer(answer, form))
