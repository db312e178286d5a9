"""Stages in the processes of a Dask cluster: one that runs already, or one on this machine while the flow runs."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

import dask
from distributed import LocalCluster
from distributed.security import Security
from prefect_dask import DaskTaskRunner

from flows.runtime.worker_process import server_for_workers

_LOOPBACK = "127.0.0.1"


def dask_runner(address: str | None, workers: int) -> StageDaskRunner:
    """A runner for the scheduler at `address`, or for a cluster of its own with `workers` processes."""
    if address is not None:
        return StageDaskRunner(address=address)
    return StageDaskRunner(cluster_class=local_cluster, cluster_kwargs={"workers": workers})


def local_cluster(workers: int) -> LocalCluster:
    """Processes with one stage each, reached through the loopback address by certificates made for this cluster."""
    dask.config.set(
        {
            # a walk in several processes and a profile start processes of their own
            "distributed.worker.daemon": False,
            # Dask would set one thread per process; as many as without Dask give the same sums to the bit
            "distributed.nanny.pre-spawn-environ": {},
        }
    )
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        host=_LOOPBACK,
        security=Security.temporary(),
        dashboard_address=f"{_LOOPBACK}:0",
        # no limit: Dask would kill a stage that needs more than its share
        memory_limit=0,
        preload=["flows.runtime.worker_process"],
        silence_logs=50,
    )


class StageDaskRunner(DaskTaskRunner):  # type: ignore[misc]
    """Prefect's runner, whose processes all report to this one's server, also if that is a temporary one."""

    def __enter__(self) -> Self:
        self._server = ExitStack()
        self._server.enter_context(server_for_workers())
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._server:
            super().__exit__(kind, error, trace)
