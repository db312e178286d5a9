"""The processes of the flow runs that `slimline serve` starts: at its end they have time to save their state, and none
outlives it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from flows.runtime.interrupts import exit_at_once, handle_signals

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.runner import Runner

log = logging.getLogger("slimline")

#: seconds that flow runs have to end after SIGTERM
_GRACE = 60.0
#: seconds that a service manager may need to signal all processes itself, which then do not get SIGTERM twice at once
_PAUSE = 1.0
_SERVED_BY = "_SLIMLINE_SERVED_BY"
#: Prefect's runner gives it to the process of each flow run
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"


def serve_until_stopped(deployments: Sequence[RunnerDeployment], limit: int) -> None:
    """Run flow runs of the deployments, `limit` at once, until a signal comes; then all that run are ended too."""
    from prefect.runner import Runner

    os.environ[_SERVED_BY] = str(os.getpid())
    runner = Runner(limit=limit)
    for deployment in deployments:
        runner.add_deployment(deployment)
    with suppress(asyncio.CancelledError):
        asyncio.run(_serve(runner))
    log.info("ended")


def _is_served() -> bool:
    """Whether this is the process of a flow run of a living `slimline serve`."""
    return os.environ.get(_SERVED_BY) == str(os.getppid())


def ignore_sigint_if_served() -> None:
    """In the process of a flow run: SIGINT of a terminal reaches all, but `slimline serve` says when to end."""
    if _is_served() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_server() -> None:
    """In the process of a flow run: end when `slimline serve` is gone, however it went."""
    if not _is_served():
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


async def _serve(runner: Runner) -> None:
    """What `prefect.serve` does, but a signal neither cancels flow runs nor kills them at once."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def end(number: int, frame: FrameType | None) -> None:
        handle_signals(_kill_flow_runs)
        log.info("ended by %s; flow runs end as soon as they can go on from there", signal.Signals(number).name)
        loop.call_soon_threadsafe(stopped.set)

    runner.handle_sigterm = end  # type: ignore[method-assign]
    handle_signals(end)
    serving, stopping = asyncio.ensure_future(runner.start()), asyncio.ensure_future(stopped.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopped.is_set():
        if poller := getattr(runner, "_scheduled_run_poller", None):
            poller.stopping = True  # no further flow run
        await _terminate_flow_runs()
        serving.cancel()
    stopping.cancel()
    await serving


async def _terminate_flow_runs() -> None:
    """Send SIGTERM to each once, and wait; the runner, which goes on meanwhile, reports how they ended."""
    deadline, signalled = time.monotonic() + _GRACE, set[int]()
    await asyncio.sleep(_PAUSE)
    while (running := _flow_runs()) and time.monotonic() < deadline:
        for process in running:
            if process.pid not in signalled:
                signalled.add(process.pid)
                process.terminate()
        await asyncio.sleep(0.2)
    _kill(running)


def _kill_flow_runs(number: int, frame: FrameType | None) -> None:
    """Handler of the second signal."""
    _kill(_flow_runs())
    exit_at_once("dropped what still ran")


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _flow_runs() -> list[psutil.Process]:
    """Children of this process that Prefect's runner started for a flow run."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it ended meanwhile
            flow_run = child.environ().get(_FLOW_RUN)
            if flow_run not in (None, os.environ.get(_FLOW_RUN)) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found
