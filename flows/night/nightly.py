"""The nightly flow: every cell of a matrix as a run of its own, several at a time, then one verdict on them all."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

from prefect import Flow, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run as running
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic.json_schema import SkipJsonSchema

from flows.night.outcome import CellFailed, CellOutcome, NightFailed, NightResult
from flows.night.regressions import compare, pass_gates
from flows.night.summary import headline, night_title, summary
from flows.records.figures.history import over_nights
from flows.records.figures.inputs import Recorded
from flows.records.lookup import mlflow_pages
from flows.run.compress import compress, open_run_context, recorded_result, unknown_stage
from flows.run.follow import followed, stages_of
from flows.run.graph import Stage
from flows.run.leaks import refuse_leaks, trains
from flows.run.outcome import RunResult, StagesFailed
from flows.run.stages import plan_stages
from flows.runtime.task_runners import RunnerName, create_runner, final_state, interruptible
from flows.runtime.user_errors import user_message
from flows.spec.load import load_night, parse_night
from flows.spec.night import Cell, NightSpec
from infra.artifacts.store import ArtifactStore
from infra.figures.draw import draw
from infra.keys import slug
from infra.provenance import git_revision, versions
from infra.results.rows import NightCellRow, NightRow
from infra.results.store import ResultsStore
from infra.running.files import FollowedRun, RunningFiles, ended
from infra.secrets import redacted
from infra.settings import Settings, load_settings
from tasks.recording.description import markdown_image
from tasks.stages.pairs import Reports
from tasks.stages.record_night import record_night

log = logging.getLogger("slimline")

#: cells at a time: what they wait for is a device, so this overlaps their bookkeeping and no more
_CELLS_AT_ONCE = 4


def _flow_run_name() -> str:
    spec = running.parameters["spec"]
    return night_title(spec) if isinstance(spec, NightSpec) else spec["name"] if isinstance(spec, dict) else str(spec)


@flow(
    name="nightly",
    flow_run_name=_flow_run_name,
    task_runner=cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=_CELLS_AT_ONCE)),
    persist_result=False,
)
def nightly(
    spec: str | dict[str, Any] | SkipJsonSchema[NightSpec], overrides: Sequence[str] = (), refresh: Sequence[str] = ()
) -> NightResult:
    """Run a night and record it.

    spec: name of a shipped night, a path, or the spec itself, parsed or as plain data. A cell that fails leaves the
    others alone. Raises NightFailed after everything is recorded if a cell failed or a gate does not hold; SpecError
    before any work, also if a cell would train on what it measures.
    """
    if isinstance(spec, str):
        spec = load_night(spec, overrides)
    night = spec if isinstance(spec, NightSpec) else parse_night(spec, source="spec")
    settings, started_at, clock = load_settings(), datetime.now(UTC), time.monotonic()
    wanted = _refreshed(night, refresh)
    _refuse_leaks(night)
    with followed(RunningFiles(settings.home), _followed_night(night)):
        outcomes = _run_cells(night, wanted)
        result = _compared(night, outcomes, settings, time.monotonic() - clock)
        pages = mlflow_pages(ResultsStore.of(settings), settings.tracking_uri)
        text = summary(result, alpha=night.alpha, tolerance=night.tolerance, pages=pages)
        try:
            record_night(_night_row(night, result, started_at), _cell_rows(result), result.figures, text, settings)
        finally:  # what was measured is shown, also where it could not be recorded everywhere
            page = text + _history(night.name, settings)
            create_markdown_artifact(page, key=f"slimline-night-{slug(night.name)}", description=headline(result))
        log.info("night %s: %s", night.name, headline(result))
        if result.message is not None:
            raise NightFailed(result)
        return result


def _history(name: str, settings: Settings) -> str:
    """The figures of this name night after night, as an image in markdown; nothing after the first night."""
    results = ResultsStore.of(settings)
    try:
        if len(results.nights(name)) < 2:
            return ""
        drawing = over_nights(Recorded(results, ArtifactStore(settings.store_root), [name]))
        return "" if drawing is None else "\n" + markdown_image(drawing.title, draw(drawing, "png"))
    except Exception as error:  # of the drawing, of the results: no night fails for an image
        log.warning("night %s: its history could not be drawn: %s", name, error)
        return ""


def on_runner(name: RunnerName, settings: Settings) -> Flow[..., NightResult]:
    """The flow with its cells in threads of this process, or as tasks of a cluster. Raises SpecError."""
    if name == "threads" and settings.runner_workers is None:
        return nightly
    return nightly.with_options(task_runner=create_runner(name, settings))


def _run_cells(night: NightSpec, wanted: Mapping[str, tuple[str, ...]]) -> tuple[CellOutcome, ...]:
    """All cells at once, _CELLS_AT_ONCE unless a cluster runs them. wanted: stages that each refreshes."""
    this = _this_flow_run()
    with interruptible() as submitted:
        for cell in night.cells:
            named = _run_cell.with_options(task_run_name=cell.name)
            submitted.append(named.submit(cell, wanted[cell.name], this.created, this.id))
        return tuple(_outcome(cell, future) for cell, future in zip(night.cells, submitted, strict=True))


@task(name="cell", cache_policy=NO_CACHE, persist_result=False)
def _run_cell(cell: Cell, refresh: tuple[str, ...], since: datetime | None, night: UUID) -> CellOutcome:
    # a cluster gets a task's function by value, with what that names: let it be one thing that can be imported there
    return run_cell(cell, refresh, since, night)


def run_cell(cell: Cell, refresh: tuple[str, ...], since: datetime | None, night: UUID) -> CellOutcome:
    """One cell as a sub-run, unless there is nothing to do. Raises CellFailed with everything that the cell came to."""
    started = time.monotonic()

    def outcome(result: RunResult | None, message: str | None = None, by_user: bool = False) -> CellOutcome:
        return CellOutcome(
            name=cell.name,
            run_key=result.run_key if result else None,
            seconds=time.monotonic() - started,
            stages=result.stages if result else (),
            metrics=result.metrics if result else (),
            message=message,
            by_user=by_user,
        )

    try:
        known = None if refresh else recorded_result(cell.spec)
        if known:
            _tell_ended(cell, night, outcome(known))
        return outcome(known or compress(cell.spec, refresh, since, night))
    except StagesFailed as error:
        raise CellFailed(outcome(error.result, str(error), error.by_user)) from error
    except Exception as error:
        words = user_message(error)
        failed = outcome(None, words or f"{type(error).__name__}: {error}", words is not None)
        _tell_ended(cell, night, failed)
        raise CellFailed(failed) from error


def _tell_ended(cell: Cell, night: UUID, outcome: CellOutcome) -> None:
    """Tell who follows the night of a cell that ended without a run of its own, or in the middle of it."""
    run = FollowedRun(
        id=f"{night}-{cell.name}", kind="run", key=outcome.run_key or "", name=cell.spec.name, part_of=str(night)
    )
    code = 0 if outcome.message is None else 2 if outcome.by_user else 1
    message = None if outcome.message is None else redacted(outcome.message)
    RunningFiles(load_settings().home).write(ended(run, code, message, stages_of(outcome.stages)))


def _outcome(cell: Cell, future: PrefectFuture[CellOutcome]) -> CellOutcome:
    answer = final_state(future).result(raise_on_failure=False)
    if isinstance(answer, CellOutcome):
        return answer
    if isinstance(answer, CellFailed):
        log.error("%s: %s", cell.name, answer)
        return answer.outcome
    message = f"{type(answer).__name__}: {answer}"
    return CellOutcome(name=cell.name, run_key=None, seconds=0.0, message=message)


def _compared(night: NightSpec, cells: tuple[CellOutcome, ...], settings: Settings, seconds: float) -> NightResult:
    """The cells' figures compared with the last good night's, and the outcome of every gate."""
    results = ResultsStore.of(settings)
    night_id = _night_id(night)
    good = [
        row.night_id
        for row in results.nights(night.name)
        if row.status == "completed" and row.gates_passed and row.night_id != night_id
    ]
    previous = good[-1] if good else None
    before = results.night_figures(previous) if previous else ()
    reports = Reports(ArtifactStore(settings.store_root))
    figures = compare(night_id, cells, before, reports, alpha=night.alpha, tolerance=night.tolerance)
    figures, gates = pass_gates(night.gates, figures)
    return NightResult(
        night_id=night_id,
        name=night.name,
        previous_night_id=previous,
        cells=cells,
        figures=figures,
        gates=gates,
        seconds=seconds,
    )


def _night_id(night: NightSpec) -> str:
    # the same when Prefect retries the flow run: a night that goes on is one night
    return f"night-{slug(night.name)}-{_this_flow_run().id.hex[-12:]}"


def _followed_night(night: NightSpec) -> FollowedRun:
    cells = {cell.name: cell.spec.name for cell in night.cells}
    return FollowedRun(id=str(_this_flow_run().id), kind="night", key=_night_id(night), name=night.name, cells=cells)


def _refreshed(night: NightSpec, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each cell those of the names that it has. Raises SpecError for one that no cell has."""
    if not names:
        return {cell.name: () for cell in night.cells}
    stages = {cell.name: plan_stages(cell.spec, open_run_context(cell.spec)).stages for cell in night.cells}
    by_name: dict[str, Stage] = {stage.name: stage for graph in stages.values() for stage in graph}
    wanted: dict[str, tuple[str, ...]] = {
        cell: tuple(name for name in names if any(name in stage.names for stage in graph))
        for cell, graph in stages.items()
    }
    for name in names:
        if not any(name in each for each in wanted.values()):
            raise unknown_stage(name, [by_name[known] for known in sorted(by_name)])
    return wanted


def _refuse_leaks(night: NightSpec) -> None:
    """Raise SpecError if a cell that still has something to do trains on what it measures."""
    for cell in night.cells:
        if not trains(cell.spec):
            continue
        try:
            run_context = open_run_context(cell.spec)
            missing = [
                stage for stage in plan_stages(cell.spec, run_context).stages if not run_context.store.has(stage.ref)
            ]
        except Exception as error:  # whatever it is, the cell fails by it, and the others do not
            log.debug("%s: not looked at for leaks: %s", cell.name, error)
            continue
        refuse_leaks(cell.spec, missing, run_context.sources)


def _night_row(night: NightSpec, result: NightResult, started_at: datetime) -> NightRow:
    return NightRow(
        night_id=result.night_id,
        name=night.name,
        spec=json.dumps(night.model_dump(mode="json")),
        status=result.status,
        gates_passed=result.gates_passed,
        started_at=started_at,
        finished_at=datetime.now(UTC),
        prefect_run_id=str(_this_flow_run().id),
        slimline_version=versions().get("slimline", "unknown"),
        git_revision=git_revision(),
        previous_night_id=result.previous_night_id,
        num_stages=len(result.stages),
        num_run=result.count("completed"),
        num_cached=result.count("cached"),
        num_failed=result.count("failed"),
        message=result.message,
    )


def _cell_rows(result: NightResult) -> tuple[NightCellRow, ...]:
    return tuple(
        NightCellRow(
            night_id=result.night_id,
            cell=cell.name,
            run_key=cell.run_key,
            status=cell.status,
            seconds=cell.seconds,
            num_run=cell.count("completed"),
            num_cached=cell.count("cached"),
            num_failed=cell.count("failed"),
            num_skipped=cell.count("skipped"),
            message=cell.message,
        )
        for cell in result.cells
    )


def _this_flow_run() -> FlowRun:
    """The night's. A retry has the first try's date of creation: stages refreshed since then are not run again."""
    context = FlowRunContext.get()
    assert context is not None, "inside the flow"
    assert context.flow_run is not None, "inside the flow"
    return context.flow_run
