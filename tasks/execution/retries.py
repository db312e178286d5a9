"""Stages are tried again, after growing pauses, when what failed passes by itself; never after a user's error."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any
from uuid import UUID

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

from evaluation.inference.oom import free_memory
from infra.settings import Settings
from pruning.errors import MemoryPart
from tasks.execution.transient import passing, short_part

log = logging.getLogger("slimline")

#: share by which Prefect lengthens or shortens a pause at random, so that runs that failed together do not come back so
_JITTER = 0.3

#: how often each task run of this process ran out of memory, and in which part, None where that is not known; Prefect
#: tries again in the process that failed
_short: dict[UUID, Counter[MemoryPart | None]] = {}
#: what smaller batches do not help: room on the device does
_WITHOUT_BATCHES: tuple[MemoryPart, ...] = ("loading", "solving")


def retry_options(settings: Settings) -> dict[str, Any]:
    """Options for a stage's task: how often it is tried again, and after which pauses in seconds."""
    pauses = [settings.retry_delay * 2**attempt for attempt in range(settings.retries)]
    return {"retries": settings.retries, "retry_delay_seconds": pauses or None, "retry_jitter_factor": _JITTER}


def passes_by_itself(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's question after a failure, asked only while tries are left."""
    error: Any = state.data  # of a task that raised, what it raised
    kind = passing(error) if isinstance(error, BaseException) else None
    if kind is None:
        return False
    if kind == "memory":
        _short.setdefault(task_run.id, Counter())[short_part(error)] += 1
    log.warning(
        "%s: %s: %s; tried again after a pause (%d of %d)",
        task_run.name,
        "out of memory" if kind == "memory" else "the network failed",
        _first_line(error),
        task_run.run_count,
        task.retries,
    )
    return True


def with_smaller_batches(settings: Settings, stage_name: str) -> Settings:
    """The settings for this try, where it ran out of memory, which changes no result: batches are halved each time,
    unless a layer could not be loaded or a Hessian not be solved; then activations lie on the host."""
    context = TaskRunContext.get()
    short = _short.get(context.task_run.id, Counter()) if context else Counter()
    if not short:
        return settings
    free_memory()
    if any(short[part] for part in _WITHOUT_BATCHES):
        log.info("%s: after running out of memory, with all activations on the host", stage_name)
        settings = settings.model_copy(update={"device_activation_budget_gib": 0.0})
    times = sum(count for part, count in short.items() if part not in _WITHOUT_BATCHES)
    if not times:
        return settings
    # a suite halves its batches itself, and comes here only if one row was too much beside what else was loaded
    evaluation = 1 if settings.eval_batch_size == "auto" else max(1, settings.eval_batch_size >> times)
    walk = max(1, settings.walk_batch_size >> times)
    log.info(
        "%s: after running out of memory, in batches of %d (walk) and %d (evaluation)", stage_name, walk, evaluation
    )
    return settings.model_copy(update={"walk_batch_size": walk, "eval_batch_size": evaluation})


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
