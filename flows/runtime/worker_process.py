"""A process of a Dask or Ray cluster: it logs, and finds its settings and its server, as the command line does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from flows.runtime.environment import prepare_process


def prepare() -> None:
    """Called once in each new process of the cluster."""
    # a terminal and a service manager signal every process; the flow's process decides what that means to stages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # else the cluster has a handler of its own
            # not ignored: the processes that a stage starts would inherit that, and could not be ended so
            signal.signal(number, lambda number, frame: None)
    prepare_process()


def dask_setup(worker: object) -> None:
    """Dask calls this in every worker that preloads this module."""
    prepare()


@contextmanager
def server_for_workers() -> Iterator[None]:
    """Have the processes of a cluster report to the server of this one, also if that is a temporary one.

    Without this each of them would start a server of its own.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    before = os.environ.get("PREFECT_API_URL")
    with get_client(sync_client=True) as client:
        url = str(client.api_url).rstrip("/")
    os.environ["PREFECT_API_URL"] = url
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        os.environ.pop("PREFECT_API_URL")
        if before is not None:
            os.environ["PREFECT_API_URL"] = before
