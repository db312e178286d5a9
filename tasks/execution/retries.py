"""Stages are tried again, after growing pauses, when what failed passes by itself: a network that dropped, a server
that was busy, memory that was short. Everything else fails the same way when it is tried again: what the user gave, a
full disk, an answer "not found".
"""

from __future__ import annotations

import errno
import logging
import ssl
from collections.abc import Iterator
from typing import Any, Literal
from uuid import UUID

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

from evaluation.inference.oom import class_names, free_memory, short_of_memory
from infra.settings import Settings

log = logging.getLogger("slimline")

#: share by which Prefect lengthens or shortens a pause at random, so that runs that failed together do not come back so
_JITTER = 0.3

#: how often each task run of this process ran out of memory; Prefect tries again in the process that failed
_short: dict[UUID, int] = {}

Passing = Literal["network", "memory"]

_BUSY = {408, 425, 429}
_NETWORK_ERRNOS = {
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ETIMEDOUT),
}
# By name, since none of these libraries need be there, and importing one to ask would take seconds.
_NETWORK = {
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
    *("httpx.TransportError", "httpx2.TransportError", "httpcore.NetworkError", "httpcore.TimeoutException"),
    *("urllib3.ProtocolError", "urllib3.TimeoutError", "urllib3.NewConnectionError", "http.IncompleteRead"),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "botocore.HTTPClientError", "socket.gaierror"),
    *("infra.Unreachable", "huggingface_hub.LocalEntryNotFoundError"),
}
# They look like the network's errors, or stand before them in a chain, and are the user's affair.
_SETTLED = {
    *("huggingface_hub.OfflineModeIsEnabled", "requests.SSLError", "requests.InvalidURL"),
    *("httpx.UnsupportedProtocol", "httpx2.UnsupportedProtocol", "datasets.DatasetNotFoundError"),
}


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
        _short[task_run.id] = _short.get(task_run.id, 0) + 1
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
    """The settings for this try: batches are halved each time that it ran out of memory, which changes no result."""
    context = TaskRunContext.get()
    times = _short.get(context.task_run.id, 0) if context else 0
    if times == 0:
        return settings
    free_memory()
    # a suite halves its batches itself, and comes here only if one row was too much beside what else was loaded
    evaluation = 1 if settings.eval_batch_size == "auto" else max(1, settings.eval_batch_size >> times)
    walk = max(1, settings.walk_batch_size >> times)
    log.info(
        "%s: after running out of memory, in batches of %d (walk) and %d (evaluation)", stage_name, walk, evaluation
    )
    return settings.model_copy(update={"walk_batch_size": walk, "eval_batch_size": evaluation})


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def passing(error: BaseException) -> Passing | None:
    """What will pass by itself, or None. What caused an error is looked at too: ours wrap those of the libraries."""
    causes = list(_chain(error))
    if any(short_of_memory(cause) for cause in causes):
        return "memory"
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):  # an answer decides, whatever it is wrapped in
            return "network" if status in _BUSY or status >= 500 else None
    if any(class_names(cause) & _SETTLED or isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return None
    return "network" if any(_of_network(cause) for cause in causes) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        hidden = following.__suppress_context__
        following = following.__cause__ or (None if hidden else following.__context__)


def _of_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or class_names(error) & _NETWORK:
        return True
    return isinstance(error, OSError) and error.errno in _NETWORK_ERRNOS
