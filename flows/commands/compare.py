"""`slimline compare`: two checkpoints on the same items, and whether they differ by more than chance."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flows.commands.app import app, prepared
from flows.commands.results import Form


@app.command()
def compare(
    run: Annotated[str, typer.Argument(metavar="A", help="RUN or RUN:CHECKPOINT; a run by its key or spec name.")],
    other: Annotated[
        str | None,
        typer.Argument(metavar="[B]", help="What to compare with; without it, A's checkpoints with their dense model."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Only this evaluation (as named in the spec).")] = None,
    alpha: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="The chance that any difference is called one although there is none."),
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    form: Annotated[Form, typer.Option("--format", help="json and csv: every value.")] = Form.table,
) -> None:
    """Compare checkpoints item by item: difference, interval, significance and flips of every figure."""
    settings = prepared()
    from flows.records.compare import Question, compared
    from flows.records.compare_tables import notes, protocol, render_pairs
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore

    question = Question(run, other, suite, alpha, seed)
    answer = compared(question, ResultsStore.of(settings), ArtifactStore(settings.store_root))
    for_the_eye = form in (Form.table, Form.markdown)
    # the notes must not spoil what a program reads
    told = sys.stdout if for_the_eye else sys.stderr
    print(render_pairs(answer, form))
    print("\n" + "\n".join(notes(answer, alpha)), file=told)
    if for_the_eye:
        print("\n" + "\n".join(protocol(answer)))
