"""The command line. Exit codes: 0; 2 for what the user can mend (one sentence, no traceback); 1 for the rest."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.environment import log_to_terminal, prepare_environment
from flows.errors import USER_ERRORS, SpecError, StagesFailed
from flows.interrupt import take_interrupts
from flows.orphans import end_orphaned_servers
from infra.settings import load_settings

if TYPE_CHECKING:
    from flows.outcome import RunResult
    from infra.settings import Settings

log = logging.getLogger("slimline")
app = typer.Typer(
    name="slimline",
    help="Make large language models small, and prove what the shrinking cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

SpecName = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped spec (slimline list specs).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B.C=VALUE", help="Override one value of the spec; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one last line of JSON with everything.")]


class Noun(StrEnum):
    """What `slimline list` can list."""

    methods = "methods"
    recoveries = "recoveries"
    suites = "suites"
    families = "families"
    specs = "specs"


class Form(StrEnum):
    """How `slimline results` prints."""

    table = "table"
    markdown = "markdown"
    json = "json"
    csv = "csv"


@app.command()
def run(
    spec: SpecName,
    set_: Overrides = [],
    refresh: Annotated[
        list[str], typer.Option(metavar="STAGE", help="Run this stage and all that follow from it again; repeatable.")
    ] = [],
    as_json: AsJson = False,
) -> None:
    """Run a spec: what is in the store already is not run again."""
    settings = _prepared()
    from flows.loading import load_spec

    loaded = load_spec(spec, set_)
    started = time.monotonic()
    take_interrupts()
    end_orphaned_servers(os.environ["PREFECT_LOCAL_STORAGE_PATH"])
    from flows.compress import compress

    ready = time.monotonic()
    try:
        result = compress(loaded, tuple(refresh))
    except StagesFailed as failed:
        _print_result(failed.result, settings, as_json)
        raise
    except KeyboardInterrupt:
        raise typer.Exit(1) from None
    log.info("done in %.1f s (imports %.1f s)", time.monotonic() - started, ready - started)
    _print_result(result, settings, as_json)


@app.command()
def plan(spec: SpecName, set_: Overrides = [], as_json: AsJson = False) -> None:
    """Show every stage of a spec with its key, and whether it is cached; nothing is run."""
    _prepared()
    from flows.compress import open_workplace
    from flows.loading import load_spec
    from flows.outline import outline
    from flows.preflight import check
    from flows.story import tell

    loaded = load_spec(spec, set_)
    workplace = open_workplace(loaded)
    story = tell(loaded, workplace.sources, workplace.settings.device)
    check(story, workplace)
    stages = [
        {"name": stage.name, "key": stage.ref.key, "cached": workplace.store.has(stage.ref)} for stage in story.stages
    ]
    cached = {entry["key"] for entry in stages if entry["cached"]}
    lines = [("  " * depth + stage.name, stage.ref.key) for depth, stage in outline(story)]
    width = max(len(name) for name, _ in lines)
    for name, key in lines:
        print(f"{'cached' if key in cached else 'to run':7} {name:{width}}  {key}")
    print(f"{'to run':7} {'record':{width}}  (never cached)")
    for name, first in story.twins.items():
        print(f"{'same':7} {name} is {first} under another name")
    if as_json:
        print(json.dumps({"run_key": story.run_key, "stages": stages}))


@app.command()
def results(
    form: Annotated[
        Form, typer.Option("--format", help="table and markdown: chosen figures; json and csv: all.")
    ] = Form.table,
    run_key: Annotated[str | None, typer.Option("--run", help="Run key or spec name; default: the newest run.")] = None,
) -> None:
    """Print what a run measured, from the results store."""
    settings = _prepared()
    from flows.report import protocol_lines, render
    from infra.registry import near
    from infra.results import ResultsStore

    store = ResultsStore(settings.results_path)
    runs = sorted(store.runs(), key=lambda row: row.finished_at)
    if not runs:
        raise SpecError(f"there are no results in {settings.results_path} yet; run a spec first: slimline run demo")
    wanted = [row for row in runs if run_key in (None, row.run_key, row.name)]
    if not wanted:
        names = sorted({row.name for row in runs})
        raise SpecError(f"no run {run_key!r}{near(str(run_key), names)}; there are: {', '.join(names)}")
    newest = wanted[-1]
    metrics = store.metrics(newest.run_key)
    if form is Form.table:
        print(f"{newest.name} ({newest.run_key}, {newest.status}, {newest.finished_at:%Y-%m-%d %H:%M} UTC)")
    print(render(metrics, form))
    if form is Form.table:
        print("\n" + "\n".join(protocol_lines(metrics, json.loads(newest.spec))))
        if newest.message:
            print(f"failed: {newest.message}")


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
    else:
        from flows.loading import load_spec, shipped_specs

        names = {name: load_spec(name).description for name in shipped_specs()}
    for name, text in names.items():
        print(f"{name:{max(map(len, names))}}  {text}")


@app.command()
def doctor() -> None:
    """Check versions, devices, sources, disk and stores."""
    settings = _prepared()
    from flows.doctor import examine

    bad = False
    for finding in examine(settings):
        print(f"{'BAD' if finding.bad else 'ok':4} {finding.topic}: {finding.answer}")
        bad = bad or finding.bad
    if bad:
        raise typer.Exit(2)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's pages.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's pages.")] = 5000,
) -> None:
    """Open Prefect's and MLflow's pages on this machine; Ctrl-C ends them."""
    settings = _prepared()
    from flows.servers import serve_pages

    serve_pages(settings, prefect_port=prefect_port, mlflow_port=mlflow_port)


def _prepared() -> Settings:
    settings = load_settings()
    prepare_environment(settings)
    return settings


def _first_line(package: str, name: str) -> str:
    from infra.registry import load

    return str(load(package, name, "module").__doc__).splitlines()[0]


def _print_result(result: RunResult, settings: Settings, as_json: bool) -> None:
    from flows.report import aligned, table_rows

    print(aligned(table_rows(result.metrics)))
    print(f"\nrun {result.run_key}")
    for name, folder in result.checkpoints.items():
        print(f"checkpoint {name}: {folder or 'not made'}")
    print("all figures with their protocol: slimline results; dashboards: see `make ui`")
    if as_json:
        print(json.dumps(_as_json(result)))


def _as_json(result: RunResult) -> dict[str, Any]:
    from flows.report import plain

    shown = {"name", "key", "status", "seconds", "message"}
    stages = [stage.model_dump(include=shown) | {"cached": stage.cached} for stage in result.stages]
    metrics = [plain(row) for row in result.metrics]
    made = {"checkpoint": result.checkpoint, "checkpoints": result.checkpoints}
    return {"run_key": result.run_key, "stages": stages, "metrics": metrics} | made


def main() -> None:
    """Entry point of the `slimline` command."""
    verbose = "--verbose" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--verbose"]
    log_to_terminal(verbose=verbose)
    try:
        app()
    except USER_ERRORS as error:
        _fail(error, 2, verbose)
    except StagesFailed as error:
        _fail(error, 2 if error.by_user else 1, verbose)
    except Exception as error:  # the last resort: an unforeseen error still gets one line and a way to see more
        log.debug("traceback", exc_info=True)
        _fail(error, 1, verbose)


def _fail(error: Exception, code: int, verbose: bool) -> None:
    unforeseen = code == 1 and not isinstance(error, StagesFailed)
    text = f"{type(error).__name__}: {error}" if unforeseen else str(error)
    hint = "" if code == 2 or verbose else " (--verbose shows the traceback)"
    print(f"slimline: {text}{hint}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
