"""`slimline sql`, `slimline report`: questions to the results store, and the tables of the papers from it."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.app import app, prepared
from flows.commands.results import Form
from flows.errors import SpecError


class ReportForm(StrEnum):
    """How `slimline report` prints."""

    markdown = "markdown"
    csv = "csv"
    latex = "latex"
    html = "html"


@app.command()
def report(
    table: Annotated[str | None, typer.Argument(metavar="[TABLE]", help="Without it, the tables are listed.")] = None,
    form: Annotated[
        ReportForm, typer.Option("--format", help="csv has a line per figure; latex needs booktabs; html is a page.")
    ] = ReportForm.markdown,
    run: Annotated[
        list[str], typer.Option(help="Only this run (key or spec name); repeatable. Default: the newest of each spec.")
    ] = [],
    out: Annotated[Path | None, typer.Option(help="Write into this file instead.")] = None,
) -> None:
    """Print a table of the papers from what is recorded, with its protocol."""
    settings = prepared()
    from flows.records.report.build import build_report
    from flows.records.report.draw import draw
    from flows.records.report.papers import TABLES
    from infra.results.store import ResultsStore

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise SpecError(f"--out {out} cannot be written: give a file in a folder that exists")
    if table is None:
        for name, known in TABLES.items():
            print(f"{name:{max(map(len, TABLES))}}  {known.title} ({known.paper})")
        return
    text = draw(build_report(ResultsStore.of(settings), table, run), form)
    if out is None:
        print(text)
    else:
        out.write_text(f"{text}\n", encoding="utf-8")
        print(f"{table} is in {out}")


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
