"""The flow: one run of a spec as cached Prefect tasks. The stages and their order are in flows/run/stages.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.errors import SpecError
from flows.records.tables import table_rows
from flows.run.outcome import RunResult, StageOutcome, StagesFailed
from flows.run.preflight import check
from flows.run.stages import Stage, StageGraph, build_stages
from flows.runtime.task_runners import THREADS, final_state, interruptible
from flows.runtime.user_errors import user_message
from flows.spec.branches import ends
from flows.spec.run import RunSpec
from infra.artifacts.claims import claimed
from infra.registry import did_you_mean
from infra.results.rows import StageRow
from infra.secrets import redacted, secrets_kept
from infra.settings import load_settings
from infra.sources.find import sources_from
from tasks.devices.pool import empty_idle_places
from tasks.execution.interrupts import refuse_interrupted
from tasks.execution.progress import settle_bars
from tasks.execution.retries import retry_options
from tasks.execution.stage import RunContext, StageResult, log_cached, log_when_cached
from tasks.requests import EvaluateRequest, ProfileRequest
from tasks.stages.record import Measured, RunOutcome, record

log = logging.getLogger("slimline")


@flow(
    name="compress",
    flow_run_name="{spec.name}",
    task_runner=cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=THREADS)),
    persist_result=False,
)
def compress(
    spec: RunSpec,
    refresh: tuple[str, ...] = (),
    refreshed_since: datetime | None = None,
    part_of: UUID | None = None,
) -> RunResult:
    """Run what is not in the store yet, record everything, and fail at the end if a stage failed.

    refresh: stages (and all that follow from them) to run again although they are in the store, unless they were made
    after `refreshed_since`: runs that share stages refresh each once. part_of: the flow run of a night, for its cells.
    Raises StagesFailed after recording; Interrupted, with nothing recorded, if the night was interrupted; the
    preflight's errors before any work.
    """
    with secrets_kept():
        return _compress(spec, refresh, refreshed_since, part_of)


def _compress(
    spec: RunSpec, refresh: tuple[str, ...], refreshed_since: datetime | None, part_of: UUID | None
) -> RunResult:
    started_at = datetime.now(UTC)
    run_context = replace(open_run_context(spec), refreshed_since=refreshed_since, part_of=part_of)
    refuse_interrupted(run_context.settings, part_of)
    graph = build_stages(spec, run_context.sources, run_context.settings.device)
    check(graph, run_context)
    again = _keys_to_refresh(graph, refresh)
    # the run needs all of them up to its record: `slimline gc` must leave alone what it found, too
    with claimed(run_context.store.root, [stage.ref for stage in graph.stages], graph.run_key):
        if not again and all(run_context.store.has(stage.ref) for stage in graph.stages):
            outcomes = tuple(found(stage, run_context) for stage in graph.stages)
        else:
            try:
                outcomes = _run_stages(graph, run_context, again)
            finally:
                empty_idle_places()
            refuse_interrupted(run_context.settings, part_of)
        return _finish(graph, outcomes, run_context, started_at)


def _run_stages(graph: StageGraph, run_context: RunContext, again: set[str]) -> tuple[StageOutcome, ...]:
    """Every stage as a Prefect task, of which those in the store are cached. again: keys to make anew."""
    retries = retry_options(run_context.settings)
    futures: dict[str, PrefectFuture[StageResult]] = {}
    with interruptible() as submitted:
        for stage in graph.stages:
            # the key is no tag: Prefect takes seconds per task to ask its server for a concurrency limit on every tag
            task = stage.task.with_options(
                refresh_cache=stage.ref.key in again, on_completion=[log_when_cached(stage.ref)], **retries
            )
            after = [futures[ref.key] for ref in stage.request.inputs]
            futures[stage.ref.key] = task.submit(stage.request, stage.name, run_context, wait_for=after)
            submitted.append(futures[stage.ref.key])
        return tuple(_outcome(stage, futures[stage.ref.key]) for stage in graph.stages)


def found(stage: Stage, run_context: RunContext) -> StageOutcome:
    """A stage of a run of which the store has everything: a task for each would cost 0.1 s and say no more."""
    log_cached(stage.name, stage.ref)
    seconds = run_context.store.manifest(stage.ref).seconds
    return StageOutcome(name=stage.name, key=stage.ref.key, kind=stage.ref.kind, status="cached", seconds=seconds)


def open_run_context(spec: RunSpec) -> RunContext:
    """Settings and sources for a spec, from the environment of this process."""
    settle_bars()
    settings = load_settings()
    return RunContext(settings, sources_from(spec.mirror, settings, start=spec.folder))


def _finish(
    graph: StageGraph, outcomes: Sequence[StageOutcome], run_context: RunContext, started_at: datetime
) -> RunResult:
    done = {stage.key for stage in outcomes if stage.status in ("completed", "cached")}
    problems = [f"{stage.name}: {stage.message}" for stage in outcomes if stage.status == "failed"]
    message = "; ".join(problems) or None
    finished = {name: ref for name, ref in graph.checkpoints.items() if ref.key in done}
    metrics = record(
        RunOutcome(
            run_key=graph.run_key,
            name=graph.spec.name,
            spec=graph.spec.model_dump(mode="json"),
            started_at=started_at,
            stages=tuple(_row(graph, outcome) for outcome in outcomes),
            checkpoints=finished,
            measured=tuple(_measured(stage) for stage in graph.reports if stage.ref.key in done),
            failed=bool(problems),
            message=message,
        ),
        run_context,
    )
    create_table_artifact(table=table_rows(metrics), key="slimline-results", description=f"{graph.spec.name}: results")
    last = ends(graph.spec.derivations)
    result = RunResult(
        run_key=graph.run_key,
        name=graph.spec.name,
        stages=tuple(outcomes),
        metrics=metrics,
        checkpoints={name: str(run_context.store.path(finished[name])) if name in finished else None for name in last},
    )
    if message is not None:
        raise StagesFailed(message, result=result, by_user=all(stage.by_user for stage in result.failures))
    return result


def _outcome(stage: Stage, future: PrefectFuture[StageResult]) -> StageOutcome:
    state = final_state(future)
    ref = stage.ref
    common = {"name": stage.name, "key": ref.key, "kind": ref.kind}
    if state.is_completed():
        made = state.result()
        cached = state.name == "Cached" or made.found
        return StageOutcome(**common, status="cached" if cached else "completed", seconds=made.seconds)
    if state.is_pending():
        log.warning("%s: skipped, a stage before it failed", stage.name)
        return StageOutcome(**common, status="skipped", seconds=None, message="a stage before it failed")
    error = state.result(raise_on_failure=False)
    words = user_message(error)
    by_user = words is not None
    message = redacted(words or f"{type(error).__name__}: {error}")
    log.error("%s: failed: %s", stage.name, message)
    return StageOutcome(**common, status="failed", seconds=None, message=message, by_user=by_user)


def _row(graph: StageGraph, outcome: StageOutcome) -> StageRow:
    values = outcome.model_dump(include={"name", "kind", "status", "seconds", "message"})
    return StageRow(run_key=graph.run_key, stage_key=outcome.key, **values)


def _measured(stage: Stage) -> Measured:
    request = stage.request
    assert isinstance(request, EvaluateRequest | ProfileRequest)
    assert stage.checkpoint is not None
    suite = request.plugin if isinstance(request, EvaluateRequest) else "profile"
    label = stage.name.split(":")[1] if isinstance(request, EvaluateRequest) else "profile"
    return Measured(
        report=stage.ref, suite=suite, label=label, checkpoint_name=stage.checkpoint, checkpoint=request.checkpoint
    )


def stages_to_refresh(stages: Sequence[str], name: str) -> set[str]:
    """The stages that a name means: "prune" names every "prune:..."."""
    return {stage for stage in stages if stage == name or stage.startswith(f"{name}:")}


def unknown_stage(name: str, known: Sequence[str]) -> SpecError:
    """The error for a stage to refresh that is none of the known ones."""
    heads = dict.fromkeys(stage.partition(":")[0] for stage in known)
    return SpecError(
        f"--refresh: unknown stage {name!r}{did_you_mean(name, [*heads, *known])}; there are: {', '.join(known)}"
    )


def _keys_to_refresh(graph: StageGraph, names: Sequence[str]) -> set[str]:
    """Keys of the named stages and of all that follow from them."""
    keys: set[str] = set()
    for name in names:
        known = [stage.name for stage in graph.stages]
        meant = stages_to_refresh(known, name)
        if not meant:
            raise unknown_stage(name, known)
        keys |= {stage.ref.key for stage in graph.stages if stage.name in meant}
    for stage in graph.stages:  # inputs come first, so one pass reaches everything
        if any(ref.key in keys for ref in stage.request.inputs):
            keys.add(stage.ref.key)
    return keys
