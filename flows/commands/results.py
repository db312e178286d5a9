"""`slimline results`, `slimline compare`, `slimline list`, `slimline doctor`: commands that only read."""

from __future__ import annotations

import json
import os
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.app import app, prepared
from flows.errors import SpecError

if TYPE_CHECKING:
    from infra.settings import Settings


class Noun(StrEnum):
    """What `slimline list` can list."""

    methods = "methods"
    recoveries = "recoveries"
    suites = "suites"
    families = "families"
    specs = "specs"
    nights = "nights"


class Form(StrEnum):
    """How `slimline results` prints."""

    table = "table"
    markdown = "markdown"
    json = "json"
    csv = "csv"


class ExportForm(StrEnum):
    """What `slimline results --export` writes."""

    lm_eval = "lm-eval"
    every_eval_ever = "every-eval-ever"


_READABLE = (Form.table, Form.markdown)


@app.command()
def results(
    form: Annotated[
        Form | None, typer.Option("--format", help="Of a run. table and markdown: chosen figures; json and csv: all.")
    ] = None,
    run_key: Annotated[
        str | None, typer.Option("--run", help="Only this run, by key or spec name; with --format alone the newest.")
    ] = None,
    export: Annotated[
        ExportForm | None, typer.Option(help="Write its evaluations for other tools instead: a JSON file a checkpoint.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of the exported files.")] = None,
) -> None:
    """Print the leaderboard: the checkpoints of every spec's newest run, the best marked; or what one run measured."""
    settings = prepared()
    _check_export(export, out)
    if export is not None and out is not None:
        _export_run(settings, export, out, run_key)
    elif form is None and run_key is None:
        _print_leaderboard(settings)
    else:
        _print_run(settings, form or Form.table, run_key)


def _export_run(settings: Settings, export: ExportForm, out: Path, run_key: str | None) -> None:
    from flows.records.export.write import export_run
    from flows.records.lookup import find_run
    from infra.results.store import ResultsStore

    store = ResultsStore.of(settings)
    for file in export_run(store, find_run(store, run_key), export.value, out):
        print(file)


def _print_leaderboard(settings: Settings) -> None:
    from flows.records.leaderboard import leaderboard
    from infra.results.store import ResultsStore

    # what is piped or written into a file is not cut
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("", "dumb")
    print(leaderboard(ResultsStore.of(settings), width=width, bold=terminal and not plain))


def _print_run(settings: Settings, form: Form, run_key: str | None) -> None:
    from flows.records.lookup import find_run
    from flows.records.tables import protocol_lines, render, with_sizes
    from infra.results.store import ResultsStore

    store = ResultsStore.of(settings)
    newest = find_run(store, run_key)
    metrics = store.metrics(newest.run_key)
    if form is Form.table:
        print(f"{newest.name} ({newest.run_key}, {newest.status}, {newest.finished_at:%Y-%m-%d %H:%M} UTC)")
    shown = with_sizes(metrics, store.checkpoints(newest.run_key)) if form in _READABLE else metrics
    print(render(shown, form))
    if form in _READABLE:
        print("\n" + "\n".join(protocol_lines(metrics, json.loads(newest.spec))))
        if newest.message:
            print(f"failed: {newest.message}")


def _check_export(export: ExportForm | None, out: Path | None) -> None:
    """Raise SpecError if one is given without the other, or if `out` is a file."""
    if export is not None and out is None:
        raise SpecError(f"--export {export.value} needs --out DIR, the folder of its files")
    if out is not None and export is None:
        forms = " or ".join(form.value for form in ExportForm)
        raise SpecError(f"--out {out} is the folder of what --export writes: give --export {forms}")
    if out is not None and out.exists() and not out.is_dir():
        raise SpecError(f"--out {out} is a file: give a folder, which may be a new one")


@app.command(name="list")
def list_(noun: Annotated[Noun, typer.Argument(help="What to list.")]) -> None:
    """List the names that a spec may use."""
    from infra.registry import available

    packages = {"methods": "pruning.methods", "recoveries": "pruning.recovery", "suites": "evaluation.suites"}
    if noun.value in packages:
        names = {name: _first_line(packages[noun.value], name) for name in available(packages[noun.value])}
    elif noun is Noun.families:
        from pruning.families import FAMILIES

        names = {family.name: ", ".join(family.architectures) for family in FAMILIES}
    elif noun is Noun.nights:
        from flows.spec.load import load_night, shipped_nights

        names = {name: load_night(name).description for name in shipped_nights()}
    else:
        from flows.spec.load import load_spec, shipped_specs

        names = {name: load_spec(name).description for name in shipped_specs()}
    for name, text in names.items():
        print(f"{name:{max(map(len, names))}}  {text}")


@app.command()
def doctor(
    spec: Annotated[list[str], typer.Option(help="A spec to look through for tokens and passwords; repeatable.")] = [],
) -> None:
    """Check versions, devices, sources, disk, stores, and what is open that should not be."""
    settings = prepared()
    from flows.commands.doctor import examine
    from infra.secrets import redacted

    findings = []
    for finding in examine(settings, spec):
        findings.append(finding)
        print(f"{'BAD' if finding.level == 'bad' else finding.level:4} {finding.topic}: {redacted(finding.answer)}")
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(2)


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
    from flows.records.compare import ComparisonRequest, compare_checkpoints
    from flows.records.compare_tables import notes, protocol, render_pairs
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore

    request = ComparisonRequest(run, other, suite, alpha, seed)
    comparison = compare_checkpoints(request, ResultsStore.of(settings), ArtifactStore(settings.store_root))
    print(render_pairs(comparison, form))
    # the notes must not spoil what a program reads
    print("\n" + "\n".join(notes(comparison, alpha)), file=sys.stdout if form in _READABLE else sys.stderr)
    if form in _READABLE:
        print("\n" + "\n".join(protocol(comparison)))


def _first_line(package: str, name: str) -> str:
    from infra.registry import load

    return str(load(package, name, "module").__doc__).splitlines()[0]
