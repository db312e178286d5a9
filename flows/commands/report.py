"""`slimline sql`, `slimline report`: questions to the results store, the tables of the papers, the page of all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.app import app, prepared
from flows.commands.results import Form
from flows.errors import SpecError

if TYPE_CHECKING:
    from infra.settings import Settings


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
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one page of all checkpoints, to sort, compare and send around."),
    ] = None,
    night: Annotated[
        str | None, typer.Option(help="With --html: the runs of this night (name or id), and what changed in it.")
    ] = None,
) -> None:
    """Print a table of the papers from what is recorded, with its protocol; or write a page of all checkpoints."""
    settings = prepared()
    if html is not None:
        _check_page(html, table, out)
        _write_page(html, settings, run, night)
        return
    if night is not None:
        raise SpecError(f"--night {night} is of the page of checkpoints: give --html FILE as well")
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


def _check_page(html: Path, table: str | None, out: Path | None) -> None:
    if table is not None:
        raise SpecError(
            f"--html writes a page of all checkpoints, without a table; {table} as HTML: slimline report {table} "
            f"--format html --out {html}"
        )
    if out is not None:
        raise SpecError(f"--html {html} and --out {out}: the page goes into one file; leave --out out")
    if html.is_dir() or not html.parent.is_dir():
        raise SpecError(f"--html {html} cannot be written: give a file in a folder that exists")


def _write_page(html: Path, settings: Settings, runs: Sequence[str], night: str | None) -> None:
    from flows.night.headlines import headlines_of_record
    from flows.records.lookup import find_night
    from flows.records.page.content import build_page
    from flows.records.page.document import page_html
    from flows.records.page.nights import read_night
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore

    results = ResultsStore.of(settings)
    recorded = None
    if night is not None:
        row = find_night(results, night)
        cells, figures = results.night_cells(row.night_id), results.night_figures(row.night_id)
        recorded = read_night(results, row, headlines_of_record(row, cells, figures))
    store = ArtifactStore(settings.store_root)
    page = build_page(results, store, tracking_uri=settings.tracking_uri, runs=runs, night=recorded)
    html.write_text(page_html(page), encoding="utf-8")
    print(f"{page.about}: {html}")


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
