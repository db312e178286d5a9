"""The flow: one run of a spec as cached Prefect tasks. Which stages there are is in flows/run/stages.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
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
from flows.run.follow import followed_run
from flows.run.graph import Stage, StageGraph
from flows.run.leaks import Leak, find_leaks
from flows.run.lineage import lineage
from flows.run.names import stage_title, title_of_running
from flows.run.outcome import RunResult, StageOutcome, StagesFailed
from flows.run.preflight import check
from flows.run.stages import plan_stages
from flows.runtime.task_runners import THREADS, final_state, interruptible
from flows.runtime.user_errors import user_message
from flows.spec.branches import ends
from flows.spec.run import RunSpec
from infra.artifacts.claims import claimed
from infra.keys import canonical_json
from infra.registry import did_you_mean
from infra.results.rows import DENSE, MetricRow, StageRow
from infra.results.store import ResultsStore
from infra.secrets import redacted, secrets_kept
from infra.settings import load_settings
from infra.sources.find import sources_from
from infra.tracking.tracker import Tracker
from tasks.devices.pool import evict_idle_models
from tasks.execution.context import RunContext, StageResult
from tasks.execution.curves import InRun
from tasks.execution.interrupts import refuse_interrupted
from tasks.execution.progress import settle_bars
from tasks.execution.retries import retry_options
from tasks.execution.stage import log_cached, log_when_cached
from tasks.recording.outcome import Measured, RunOutcome
from tasks.requests import EvaluateRequest, FileProfileRequest, ProfileRequest
from tasks.stages.record import record

#: what the results store keeps of a stage's outcome, beside its key
_RECORDED = {"name", "kind", "status", "seconds", "message"}

log = logging.getLogger("slimline")


@flow(
    name="compress",
    flow_run_name=title_of_running,
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
        started_at = datetime.now(UTC)
        run_context = replace(open_run_context(spec), refreshed_since=refreshed_since, part_of=part_of)
        refuse_interrupted(run_context.settings, part_of)
        graph = plan_stages(spec, run_context)
        check(graph, run_context)
        refreshed = _keys_to_refresh(graph, refresh)
        # the run needs all of them up to its record: `slimline gc` must leave alone what is cached, too
        with (
            claimed(run_context.store.root, [stage.ref for stage in graph.stages], graph.run_key),
            followed_run(graph, run_context, refreshed) as tell,
        ):
            if not refreshed and _all_cached(graph, run_context):
                outcomes = _cached_outcomes(graph, run_context)
            else:
                try:
                    outcomes = _run_stages(graph, run_context, refreshed, started_at)
                finally:
                    evict_idle_models()
                refuse_interrupted(run_context.settings, part_of)
            tell(outcomes)
            return _finish(graph, outcomes, run_context, started_at)


def recorded_result(spec: RunSpec) -> RunResult | None:
    """The result of a run that needs nothing any more, without a flow run: of a night whose cells are all cached that
    is most of the time.

    None if the store lacks a stage, DuckDB or MLflow the run, or it was recorded from a spec with other words. Raises
    SourceMissing and what the stores raise if they cannot be read.
    """
    run_context = open_run_context(spec)
    graph = plan_stages(spec, run_context)
    if not _all_cached(graph, run_context):
        return None
    results, plain_spec = ResultsStore.of(run_context.settings), canonical_json(spec.model_dump(mode="json"))
    rows = [row for row in results.runs() if row.run_key == graph.run_key and row.status == "completed"]
    if not rows or canonical_json(json.loads(rows[-1].spec)) != plain_spec:
        return None
    if not Tracker(run_context.settings.tracking_uri).has(graph.run_key):
        return None
    return _result(graph, _cached_outcomes(graph, run_context), results.metrics(graph.run_key), run_context)


def _all_cached(graph: StageGraph, run_context: RunContext) -> bool:
    return all(run_context.store.has(stage.ref) for stage in graph.stages)


def _cached_outcomes(graph: StageGraph, run_context: RunContext) -> tuple[StageOutcome, ...]:
    """Of a run of which the store has everything: a task for each stage would cost 0.1 s and say no more."""
    outcomes = []
    for stage in graph.stages:
        log_cached(stage.name, stage.ref)
        seconds = run_context.store.manifest(stage.ref).seconds
        outcomes.append(
            StageOutcome(name=stage.name, key=stage.ref.key, kind=stage.ref.kind, status="cached", seconds=seconds)
        )
    return tuple(outcomes)


def _run_stages(
    graph: StageGraph, run_context: RunContext, refreshed: set[str], started_at: datetime
) -> tuple[StageOutcome, ...]:
    """Every stage as a Prefect task, of which those in the store are cached. refreshed: keys to make anew."""
    retries = retry_options(run_context.settings)
    futures: dict[str, PrefectFuture[StageResult]] = {}
    with interruptible() as submitted:
        for stage in in_order_of_submission(graph):
            # the key is no tag: Prefect takes seconds per task to ask its server for a concurrency limit on every tag
            task = stage.task.with_options(
                task_run_name=stage_title(stage).replace("{", "{{").replace("}", "}}"),
                refresh_cache=stage.ref.key in refreshed,
                on_completion=[log_when_cached(stage.name, stage.ref)],
                **retries,
            )
            after = [futures[ref.key] for ref in stage.request.inputs]
            context = replace(run_context, in_run=_in_run(stage, graph, started_at))
            futures[stage.ref.key] = task.submit(stage.request, stage.name, context, wait_for=after)
            submitted.append(futures[stage.ref.key])
        return tuple(_outcome(stage, futures[stage.ref.key]) for stage in graph.stages)


def _in_run(stage: Stage, graph: StageGraph, started_at: datetime) -> InRun | None:
    """Where the curves of a stage are shown, if it makes a checkpoint of a step."""
    if stage.ref.kind != "checkpoint" or not stage.checkpoint:
        return None
    return InRun(graph.run_key, graph.spec.name, stage.checkpoint, started_at)


def in_order_of_submission(graph: StageGraph) -> list[Stage]:
    """What makes artifacts, then evaluations, all of one checkpoint next to each other, then profiles: devices are
    given to who comes first, and so load each model once."""
    keys = [ref.key for ref in graph.checkpoints.values()]

    def place(stage: Stage) -> tuple[int, int]:
        if isinstance(stage.request, EvaluateRequest):
            return 1, keys.index(stage.request.checkpoint.key)
        return 2 if stage.ref.kind == "report" else 0, 0

    return sorted(graph.stages, key=place)


def open_run_context(spec: RunSpec) -> RunContext:
    """Settings from the environment of this process, and where a spec's model and data are looked for."""
    settle_bars()
    settings = load_settings()
    return RunContext(settings, sources_from(spec.mirror, settings, start=spec.folder))


def _finish(
    graph: StageGraph, outcomes: Sequence[StageOutcome], run_context: RunContext, started_at: datetime
) -> RunResult:
    """Record the run, show its table in Prefect, and raise StagesFailed if a stage failed."""
    done, leaks = _done(outcomes), find_leaks(graph.spec, run_context.sources, look=False)
    measured = [_measured(stage, graph, leaks) for stage in graph.reports if stage.ref.key in done]
    problems = [f"{stage.name}: {stage.message}" for stage in outcomes if stage.status == "failed"]
    message = "; ".join(problems) or None
    metrics = record(
        RunOutcome(
            run_key=graph.run_key,
            name=graph.spec.name,
            spec=graph.spec.model_dump(mode="json"),
            started_at=started_at,
            stages=tuple(
                StageRow(run_key=graph.run_key, stage_key=outcome.key, **outcome.model_dump(include=_RECORDED))
                for outcome in outcomes
            ),
            checkpoints={name: ref for name, ref in graph.checkpoints.items() if ref.key in done},
            lineage=lineage(graph.spec),
            files={each.checkpoint_name: each.checkpoint for each in measured if each.checkpoint.kind == "export"},
            measured=tuple(measured),
            failed=bool(problems),
            message=message,
        ),
        run_context,
    )
    create_table_artifact(table=table_rows(metrics), key="slimline-results", description=f"{graph.spec.name}: results")
    result = _result(graph, outcomes, metrics, run_context)
    if message is not None:
        raise StagesFailed(message, result=result, by_user=all(stage.by_user for stage in result.failures))
    return result


def _result(
    graph: StageGraph, outcomes: Sequence[StageOutcome], metrics: Sequence[MetricRow], run_context: RunContext
) -> RunResult:
    done, refs = _done(outcomes), graph.checkpoints
    return RunResult(
        run_key=graph.run_key,
        name=graph.spec.name,
        stages=tuple(outcomes),
        metrics=tuple(metrics),
        checkpoints={
            name: str(run_context.store.path(refs[name])) if refs[name].key in done else None
            for name in ends(graph.spec.derivations)
        },
    )


def _done(outcomes: Iterable[StageOutcome]) -> set[str]:
    """The keys whose artifacts are there."""
    return {outcome.key for outcome in outcomes if outcome.status in ("completed", "cached")}


def _outcome(stage: Stage, future: PrefectFuture[StageResult]) -> StageOutcome:
    state = final_state(future)
    common = {"name": stage.name, "key": stage.ref.key, "kind": stage.ref.kind}
    if state.is_completed():
        result = state.result()
        cached = state.name == "Cached" or result.found
        return StageOutcome(**common, status="cached" if cached else "completed", seconds=result.seconds)
    if state.is_pending():
        log.warning("%s: skipped, a stage before it failed", stage.name)
        return StageOutcome(**common, status="skipped", seconds=None, message="a stage before it failed")
    error = state.result(raise_on_failure=False)
    sentence = user_message(error)
    message = redacted(sentence or f"{type(error).__name__}: {error}")
    log.error("%s: failed: %s", stage.name, message)
    return StageOutcome(**common, status="failed", seconds=None, message=message, by_user=sentence is not None)


def _measured(stage: Stage, graph: StageGraph, leaks: Sequence[Leak]) -> Measured:
    request = stage.request
    assert isinstance(request, EvaluateRequest | ProfileRequest | FileProfileRequest)
    files = {file.name: file.checkpoint for file in graph.spec.files}
    origin = graph.spec.tokenizer_of(files.get(stage.checkpoint, stage.checkpoint))
    suite = request.plugin if isinstance(request, EvaluateRequest) else stage.action
    return Measured(
        report=stage.ref,
        suite=suite,
        label=stage.label or suite,
        checkpoint_name=stage.checkpoint,
        checkpoint=request.measured,
        leaks=tuple(leak.sentence for leak in leaks if leak.touches(stage)),
        vocabulary="" if origin == DENSE else graph.checkpoints[origin].key,
    )


def unknown_stage(name: str, stages: Sequence[Stage]) -> SpecError:
    """The error for a stage to refresh that is none of these."""
    known = [stage.name for stage in stages]
    actions = dict.fromkeys(stage.action for stage in stages)
    return SpecError(
        f"--refresh: unknown stage {name!r}{did_you_mean(name, [*actions, *known])}; there are: {', '.join(known)}"
    )


def _keys_to_refresh(graph: StageGraph, names: Sequence[str]) -> set[str]:
    """Keys of the named stages and of all that follow from them."""
    keys: set[str] = set()
    for name in names:
        meant = {stage.ref.key for stage in graph.stages if name in stage.names}
        if not meant:
            raise unknown_stage(name, graph.stages)
        keys |= meant
    for stage in graph.stages:  # inputs come first, so one pass reaches everything
        if any(ref.key in keys for ref in stage.request.inputs):
            keys.add(stage.ref.key)
    return keys
