"""`slimline push`: a checkpoint of a run as a repository of the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.app import app, prepared
from flows.commands.checkpoints.export import Checkpoint
from flows.commands.store import Run, in_units


@app.command()
def push(
    run: Run,
    repo: Annotated[str, typer.Option(metavar="ORG/NAME", help="The repository; it is made if there is none.")],
    checkpoint: Checkpoint = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; otherwise it is private.")] = False,
) -> None:
    """Upload what `slimline export --format hf` writes to the hub. Nothing else ever uploads anything."""
    settings = prepared()
    import tempfile
    from pathlib import Path

    from flows.checkpoints.export import export_hf
    from flows.checkpoints.find import find_checkpoint
    from infra import hub
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore

    hub.check_upload(repo, private=not public)
    results = ResultsStore.of(settings)
    found = find_checkpoint(results, ArtifactStore(settings.store_root), run, checkpoint)
    with tempfile.TemporaryDirectory(dir=settings.home, prefix=".push-") as place:
        folder = Path(place) / "folder"
        exported = export_hf(found, results, settings, folder, stock=False)
        message = f"{found.row.checkpoint} of {found.run.run_key}"
        address = hub.upload(folder, repo, private=not public, message=message)
    who = "everybody sees it" if public else "private"
    print(f"{found.run.run_key}: {found.row.checkpoint} ({in_units(exported.bytes)}) is in {repo} ({who}): {address}")
