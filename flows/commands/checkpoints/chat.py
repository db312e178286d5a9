"""`slimline chat`: a talk with a checkpoint of a run, the dense one beside it on demand."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from flows.commands.app import app, prepared
from flows.commands.checkpoints.export import Checkpoint
from flows.commands.store import Run
from flows.errors import SpecError


class _Terminal:
    """Plain text where nobody looks; in a terminal names in bold."""

    def __init__(self, *, named: bool) -> None:
        self._bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._named = named

    def write(self, text: str) -> None:
        """At once, not line by line."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def name(self, name: str) -> None:
        """Only where there are several."""
        if self._named:
            self.write(f"\x1b[1m{name}\x1b[0m: " if self._bold else f"{name}: ")


@app.command()
def chat(
    run: Run,
    checkpoint: Checkpoint = None,
    dense: Annotated[bool, typer.Option("--dense", help="Let the dense model answer too, before it.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; more: drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    system: Annotated[str | None, typer.Option(help="What a model with a chat template is told first.")] = None,
) -> None:
    """Talk with a checkpoint: a line each from the terminal or a pipe; /new forgets, Ctrl-D ends."""
    settings = prepared()
    from evaluation.inference.dialogue import DialogueOptions
    from flows.checkpoints.chat import talk
    from flows.checkpoints.find import find_checkpoint
    from infra.artifacts.store import ArtifactStore
    from infra.results.rows import DENSE
    from infra.results.store import ResultsStore
    from tasks.exporting.talk import open_dialogue

    results, artifacts = ResultsStore.of(settings), ArtifactStore(settings.store_root)
    found = [find_checkpoint(results, artifacts, run, checkpoint)]
    if dense:
        found.insert(0, find_checkpoint(results, artifacts, found[0].run.run_key, DENSE))
    options = DialogueOptions(max_tokens, temperature, seed, system)
    dialogues = {each.row.checkpoint: open_dialogue(each.folder, settings.device, options) for each in found}
    without = [name for name, dialogue in dialogues.items() if not dialogue.has_template]
    if system is not None and without:
        raise SpecError(f"--system: {without[0]} has no chat template to be told that with; leave it out")
    if without:
        print(f"note: {', '.join(without)} has no chat template: each text is continued", file=sys.stderr)
    talk(dialogues, _lines(), _Terminal(named=len(dialogues) > 1))


def _lines() -> Iterator[str]:
    """Of a person, asked with a prompt, or of a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
