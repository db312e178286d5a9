"""`slimline run`, `slimline plan`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.app import AsJson, Overrides, Refresh, Runner, SpecName, app, prepared
from flows.run.outcome import StagesFailed
from flows.runtime.interrupts import interruptible_command
from flows.runtime.prefect_access import import_prefect, reach_prefect, server_is_named
from flows.runtime.task_runners import check_runner, create_runner

if TYPE_CHECKING:
    from flows.run.outcome import RunResult
    from flows.spec.run import RunSpec
    from infra.settings import Settings

log = logging.getLogger("slimline")


@app.command()
def run(
    spec: SpecName,
    set_: Overrides = [],
    refresh: Refresh = [],
    runner: Runner = None,
    as_json: AsJson = False,
) -> None:
    """Run a spec: what is in the store already is not run again."""
    settings = prepared()
    from flows.spec.load import load_spec

    run_spec(load_spec(spec, set_), settings, refresh=refresh, runner=runner, as_json=as_json)


def run_spec(
    spec: RunSpec,
    settings: Settings,
    *,
    refresh: Sequence[str] = (),
    runner: str | None = None,
    as_json: bool = False,
) -> None:
    """Run a spec from the command line and print what came out. Raises StagesFailed after printing the rest.

    Of a run that needs nothing any more Prefect hears only where a server is named: starting one takes longer than all
    the rest.

    runner: "threads", "dask" or "ray"; by default as the settings say.
    """
    started = time.monotonic()
    chosen = check_runner(runner or settings.runner, settings)
    with interruptible_command():
        named = server_is_named()
        from flows.run.compress import compress, recorded_result

        ready = time.monotonic()
        result = None if refresh or named else recorded_result(spec)
        if result is None:
            reach_prefect()
            ready = time.monotonic()
            try:
                result = compress.with_options(task_runner=create_runner(chosen, settings))(spec, tuple(refresh))
            except StagesFailed as failed:
                print_result(failed.result, settings, as_json)
                raise
    log.info("done in %.1f s (imports %.1f s)", time.monotonic() - started, ready - started)
    print_result(result, settings, as_json)


@app.command()
def plan(
    spec: SpecName,
    set_: Overrides = [],
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure this machine for some seconds, and say how long prunings take.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show every stage of a spec with its key, and whether it is cached; nothing is run."""
    prepared()
    import_prefect()
    from flows.run.compress import open_run_context
    from flows.run.preflight import check
    from flows.run.stages import plan_stages
    from flows.spec.load import load_spec

    loaded = load_spec(spec, set_)
    run_context = open_run_context(loaded)
    graph = plan_stages(loaded, run_context)
    check(graph, run_context)
    stages = [
        {"name": stage.name, "key": stage.ref.key, "cached": run_context.store.has(stage.ref)} for stage in graph.stages
    ]
    cached = {entry["key"] for entry in stages if entry["cached"]}
    lines = [("  " * depth + stage.name, stage.ref.key) for depth, stage in graph.outline]
    width = max(len(name) for name, _ in lines)
    for name, key in lines:
        print(f"{'cached' if key in cached else 'to run':7} {name:{width}}  {key}")
    print(f"{'to run':7} {'record':{width}}  (never cached)")
    for name, first in graph.aliases.items():
        print(f"{'same':7} {name} is {first} under another name")
    told: dict[str, Any] = {"run_key": graph.run_key, "stages": stages}
    if estimate:
        from flows.run import estimate as estimating

        estimates = estimating.estimate(graph, run_context)
        print("\n" + "\n".join(estimating.lines(estimates)))
        told["estimates"] = estimating.as_json(estimates)
    if as_json:
        print(json.dumps(told))


def print_result(result: RunResult, settings: Settings, as_json: bool) -> None:
    """The table with its warnings, where the checkpoints are, and on request everything as one line of JSON."""
    from flows.records.tables import aligned, table_rows, warnings_of, with_sizes
    from infra.results.store import ResultsStore

    figures = with_sizes(result.metrics, ResultsStore.of(settings).checkpoints(result.run_key))
    print("\n".join([aligned(table_rows(figures)), *warnings_of(result.metrics)]))
    print(f"\nrun {result.run_key}")
    for name, folder in result.checkpoints.items():
        print(f"checkpoint {name}: {folder or 'not made'}")
    for stage in result.stages:
        if stage.kind == "export" and stage.status in ("completed", "cached"):
            print(f"{stage.name}: {settings.store_root / stage.kind / stage.key}")
    print(f"all figures with their protocol: slimline results --run {result.name}; dashboards: see `make ui`")
    if as_json:
        print(json.dumps(_as_json(result)))


def _as_json(result: RunResult) -> dict[str, Any]:
    from flows.records.tables import plain

    shown = {"name", "key", "status", "seconds", "message"}
    stages = [stage.model_dump(include=shown) | {"cached": stage.cached} for stage in result.stages]
    metrics = [plain(row) for row in result.metrics]
    return {
        "run_key": result.run_key,
        "stages": stages,
        "metrics": metrics,
        "checkpoint": result.checkpoint,
        "checkpoints": result.checkpoints,
    }
