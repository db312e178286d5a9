"""`slimline figure`: the figures of the papers, and others, as files from what is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.app import app, prepared
from flows.errors import SpecError


@app.command()
def figure(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Without it, the figures are listed.")] = None,
    run: Annotated[
        list[str],
        typer.Option(
            help="Only this run (key or spec name), repeatable; of history the night. Default: the newest of each spec."
        ),
    ] = [],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file .svg, .png or .pdf; by default NAME.svg, here.")
    ] = None,
) -> None:
    """Draw a figure of what is recorded, with its protocol below."""
    settings = prepared()
    from flows.records.figures.catalogue import FIGURES, build_figure
    from flows.records.figures.inputs import Recorded
    from infra.artifacts.store import ArtifactStore
    from infra.figures.draw import FORMS, draw
    from infra.results.store import ResultsStore

    form = next((form for form in FORMS if out is None or out.suffix.lower() == f".{form}"), None)
    if form is None:
        raise SpecError(f"--out {out} is no figure that can be written; its name must end in .svg, .png or .pdf")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise SpecError(f"--out {out} cannot be written: give a file in a folder that exists")
    if name is None:
        for each, known in FIGURES.items():
            print(f"{each:{max(map(len, FIGURES))}}  {known.title}")
        return
    drawing = build_figure(Recorded(ResultsStore.of(settings), ArtifactStore(settings.store_root), tuple(run)), name)
    path = out or Path(f"{name}.svg")
    path.write_bytes(draw(drawing, form))
    print(f"{name} is in {path}")
