"""What every cached stage has in common: its Prefect task, its lock, its device, its folder in the store."""

from __future__ import annotations

import importlib
import logging
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.provenance import versions
from infra.remote.store import remote_store
from infra.running.files import RunningFiles
from infra.secrets import secrets_kept
from infra.settings import Settings, load_settings
from tasks.devices.placement import Placement
from tasks.devices.pool import pool
from tasks.execution.context import RunContext, StageContext, StageResult
from tasks.execution.curves import live_curves
from tasks.execution.disk_forecast import Forecast, check_room
from tasks.execution.interrupts import Interrupted, ended_by_marks, refuse_elsewhere, refuse_interrupted
from tasks.execution.progress import stage_progress
from tasks.execution.retries import passes_by_itself, with_smaller_batches
from tasks.requests import EvaluateRequest, Request

log = logging.getLogger("slimline")

importing = threading.Lock()
"""Held while a thread imports libraries: two that import parts of transformers at once, or one that only uses
`datasets` (it looks into transformers) while another does, see it half initialised and fail."""


Fill = Callable[[Any, StageContext], None]
Devices = Literal["none", "one", "all", "walk", "evaluation"]
"""What a stage computes on; a walk and an evaluation have one device if settings.walk_processes or eval_processes is
1, and else all."""


def stage(
    name: str,
    fill: Fill,
    *,
    devices: Devices | Callable[[Any], Devices],
    imports: tuple[str, ...] | Callable[[Any], tuple[str, ...]],
) -> Task[..., StageResult]:
    """A Prefect task from a function that fills a folder.

    devices: what it computes on; imports: the heavy modules that it imports when it runs. Either may be said by its
    request.
    """

    def run(request: Request, stage_name: str, run_context: RunContext) -> StageResult:
        with secrets_kept():  # Prefect writes an error into its database, and beside the result
            refuse_elsewhere(run_context.settings)
            run_context = replace(run_context, settings=with_smaller_batches(run_context.settings, stage_name))
            modules = imports(request) if callable(imports) else imports
            places = devices(request) if callable(devices) else devices
            return run_stage(request, stage_name, run_context, fill, devices=places, imports=modules)

    return Task(
        fn=run,
        name=name,
        task_run_name="{stage_name}",
        cache_key_fn=_cache_key,
        persist_result=True,
        result_serializer="json",
        retry_condition_fn=passes_by_itself,
    )


def run_stage(
    request: Request,
    stage_name: str,
    run_context: RunContext,
    fill: Fill,
    *,
    devices: Devices,
    imports: tuple[str, ...] = (),
) -> StageResult:
    """Make the artifact of `request` unless the store has it. One process at a time works on one key."""
    store, ref = run_context.store, request.ref
    sharing = remote_store(run_context.settings)
    with store.lock(ref):
        if store.has(ref) and not (_refreshing() and _older(store, ref, run_context.refreshed_since)):
            log.info("%s: %s found in the store, not run", stage_name, ref.key)
            sharing.share(ref, store)
            return _found(ref, store)
        if not _refreshing() and sharing.fetch(ref, store):
            return _found(ref, store)
        with sharing.lock(ref):
            # once more: another machine may have made it while we waited for its lock
            if not _refreshing() and sharing.fetch(ref, store):
                return _found(ref, store)
            check_room(
                f"stage {stage_name}",
                Forecast(store, run_context.sources, run_context.settings).need(request),
                store,
                run_context.settings,
                requests=[request],
            )
            _import_in_turn(imports)
            seconds = _make(request, stage_name, run_context, fill, devices)
            log.info("%s: done in %.1f s", stage_name, seconds)
            sharing.share(ref, store, replace=True)
            return StageResult(ref=ref, seconds=seconds)


def _found(ref: ArtifactRef, store: ArtifactStore) -> StageResult:
    return StageResult(ref=ref, seconds=store.manifest(ref).seconds, found=True)


def _make(request: Request, stage_name: str, run_context: RunContext, fill: Fill, devices: Devices) -> float:
    """Make the artifact when there is a device for it; returns the seconds that it took. Raises Interrupted."""
    store, ref, settings = run_context.store, request.ref, run_context.settings
    with live_curves(settings, run_context.in_run, importing) as curves, _placed(settings, devices, request) as place:
        refuse_interrupted(settings, run_context.part_of)  # the wait for a device may have been long
        log.info("%s: running, %s is %s", stage_name, ref.key, "refreshed" if _refreshing() else "not in the store")
        started = time.monotonic()
        try:
            with (
                RunningFiles(settings.home).making(stage_name, ref.key) as note,
                stage_progress(stage_name, ended_by_marks(settings, run_context.part_of), note) as progress,
                store.writing(
                    ref, request=request.model_dump(mode="json"), versions=versions(), replace=_refreshing()
                ) as folder,
            ):
                fill(request, StageContext(run_context, folder, ref, place, progress, curves))
                run_context.sources.require_unchanged(request.origins)
        except BaseException as error:
            if isinstance(error, Interrupted):
                log.info("%s: %s", stage_name, error)
            _clear_frames(error)
            raise
        store.drop_scratch(ref)
        return time.monotonic() - started


def _clear_frames(error: BaseException) -> None:
    """Empty the frames that an error came through: they hold models, and Prefect keeps the error until the run ends."""
    errors: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in errors:
        errors.append(cause)
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def log_when_cached(stage_name: str, ref: ArtifactRef) -> Callable[[Task[..., StageResult], TaskRun, State[Any]], None]:
    """A completion hook that says when a stage was a hit: then the stage itself does not run and cannot say so."""

    def log_if_cached(task: Task[..., StageResult], task_run: TaskRun, state: State[Any]) -> None:
        if state.name == "Cached":
            log_cached(stage_name, ref)

    return log_if_cached


def log_cached(stage_name: str, ref: ArtifactRef) -> None:
    """Say that a stage is not run; what could not be shared when it was made is shared now."""
    log.info("%s: not run, %s is cached", stage_name, ref.key)
    settings = load_settings()
    remote_store(settings).share(ref, ArtifactStore(settings.store_root))


def _import_in_turn(modules: tuple[str, ...]) -> None:
    """Import before the stage does, one thread at a time."""
    with importing:
        for module in modules:
            importlib.import_module(module)


def _placed(settings: Settings, devices: Devices, request: Request) -> AbstractContextManager[Placement | None]:
    if devices == "none":
        return nullcontext()
    processes = {"one": 1, "walk": settings.walk_processes, "evaluation": settings.eval_processes}
    places = pool(settings.device, settings.device_lease)
    # only evaluations go on with the model that the one before them loaded; all others get their places empty
    needs = request.measured.key if isinstance(request, EvaluateRequest) else None
    return places.one(needs) if processes.get(devices) == 1 else places.all(needs)


def _cache_key(context: Any, parameters: dict[str, Any]) -> str:
    request: Request = parameters["request"]
    return request.ref.key


def _older(store: ArtifactStore, ref: ArtifactRef, moment: datetime | None) -> bool:
    return moment is None or store.manifest(ref).created_at < moment


def _refreshing() -> bool:
    context = TaskRunContext.get()
    return bool(context and context.task.refresh_cache)
