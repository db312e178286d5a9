"""Where stages run: in threads of this process, or in the processes of a Dask or Ray cluster.

Clusters share the home (one machine, or a network file system) and Prefect's server with the flow.
"""

from __future__ import annotations

import importlib.util
import signal
import threading
import time
from asyncio import CancelledError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from flows.errors import SpecError
from flows.runtime import interrupts
from infra.registry import did_you_mean

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State
    from prefect.futures import PrefectFuture
    from prefect.task_runners import TaskRunner

    from infra.settings import Settings

RunnerName = Literal["threads", "dask", "ray"]

#: stages wait for devices, not for threads: enough threads that every stage that could run has one
THREADS = 16
_CPU_WORKERS = 2
#: seconds that a stage has to end by itself although it has nothing to save
_PATIENCE = 10.0


def create_runner(name: RunnerName, settings: Settings) -> TaskRunner[PrefectFuture[Any]]:
    """The task runner for a flow. Raises SpecError, before any work, if it is not installed or settings contradict."""
    check_runner(name, settings)
    runner: object
    if name == "dask":
        from flows.runtime.dask_runner import dask_runner

        runner = dask_runner(settings.runner_address, _workers(settings))
    elif name == "ray":
        from flows.runtime.ray_runner import ray_runner

        runner = ray_runner(settings.runner_address, _workers(settings))
    else:
        from prefect.task_runners import ThreadPoolTaskRunner

        runner = ThreadPoolTaskRunner(max_workers=settings.runner_workers or THREADS)
    return cast("TaskRunner[PrefectFuture[Any]]", runner)


def check_runner(name: str, settings: Settings) -> RunnerName:
    """The name of a runner that can work. Raises SpecError for any other."""
    known = get_args(RunnerName)
    if name not in known:
        raise SpecError(f"unknown runner {name!r}{did_you_mean(name, known)}; available: {', '.join(known)}")
    if name == "threads":
        if settings.runner_address is not None:
            raise SpecError(
                f"SLIMLINE_RUNNER_ADDRESS={settings.runner_address} names a cluster and the runner is threads; "
                "unset it or use --runner dask or ray"
            )
        return "threads"
    for module in (f"prefect_{name}", "distributed" if name == "dask" else "ray"):
        if importlib.util.find_spec(module) is None:
            raise SpecError(f"--runner {name} needs {module}; install it with `pip install 'slimline[{name}]'`")
    if settings.runner_address is not None and settings.runner_workers is not None:
        raise SpecError(
            f"SLIMLINE_RUNNER_WORKERS={settings.runner_workers} is the size of a cluster that slimline starts, and the "
            f"one at SLIMLINE_RUNNER_ADDRESS={settings.runner_address} runs already; unset one of them"
        )
    return cast(RunnerName, name)


def final_state(future: PrefectFuture[Any]) -> State[Any]:
    """How a stage ended, its tries included: completed, failed, or "NotReady" when one before it failed.

    A stage whose process died, again and again, has no state of its own: it has failed with the runner's error.
    """
    from prefect.states import Failed

    future.wait()
    state = future.state
    if state.is_final() or state.name == "NotReady":
        return state
    try:
        future.result()
    except Exception as error:
        return Failed(message=str(error), data=error)
    return future.state


@contextmanager
def interruptible() -> Iterator[list[PrefectFuture[Any]]]:
    """For a flow, which puts what it submits into the list. After a signal no other stage begins on any worker, and
    those that run are waited for, each until it is finished or has saved its state: flows/runtime/interrupts.py."""
    from prefect.context import FlowRunContext
    from prefect.exceptions import TerminationSignal
    from prefect.task_runners import ThreadPoolTaskRunner

    from flows.runtime.flow_processes import ignore_sigint_if_served
    from infra.settings import load_settings
    from tasks.execution.interrupts import interrupted, not_interrupted

    context = FlowRunContext.get()
    assert context is not None, "inside a flow"
    assert context.flow_run is not None, "inside a flow"
    ignore_sigint_if_served()
    not_interrupted(load_settings(), context.flow_run.id)
    submitted: list[PrefectFuture[Any]] = []
    try:
        yield submitted
    except (KeyboardInterrupt, TerminationSignal) as error:
        interrupts.handle_later_signals(signal.SIGTERM if isinstance(error, TerminationSignal) else None)
        with interrupted(load_settings(), context.flow_run.id, at_once=interrupts.ends_soon()):
            _wait_for(submitted, in_threads=isinstance(context.task_runner, ThreadPoolTaskRunner))
        if interrupts.in_command():  # Prefect would send us the signal once more
            raise KeyboardInterrupt from None
        raise


def _wait_for(submitted: Sequence[PrefectFuture[Any]], *, in_threads: bool) -> None:
    """Wait until all have ended. In threads of this process, and if they are to end soon, those that have nothing to
    save get _PATIENCE seconds: a thread that waits for a lock or for a download does not notice an interrupt."""
    from tasks.execution.interrupts import anything_to_save

    def wait() -> None:
        for future in submitted:
            with suppress(Exception, CancelledError):  # of a stage that did not begin; what became of it is not asked
                future.wait()

    waiting = threading.Thread(target=copy_context().run, args=(wait,), daemon=True)
    waiting.start()
    deadline = time.monotonic() + _PATIENCE
    while waiting.is_alive():
        waiting.join(0.2)
        if in_threads and interrupts.ends_soon() and time.monotonic() > deadline and not anything_to_save():
            interrupts.exit_at_once("dropped what still ran: it had nothing to save")


def _workers(settings: Settings) -> int:
    from tasks.devices.placement import accelerator_name, device_names

    names = device_names(settings.device)
    devices = len(names) if accelerator_name(names[0]) else _CPU_WORKERS
    return settings.runner_workers or devices
