"""Stages in the processes of a Ray cluster: one that runs already, or one on this machine while the flow runs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, Self

from prefect_ray import RayTaskRunner

from flows.runtime.worker_process import server_for_workers


def ray_runner(address: str | None, workers: int) -> StageRayRunner:
    """A runner for the cluster at `address`, or for one of its own that runs `workers` stages at a time."""
    if address is not None:
        return StageRayRunner(address=address)
    return StageRayRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})


class StageRayRunner(RayTaskRunner[Any]):  # type: ignore[misc]
    """Prefect's runner, whose processes all report to this one's server, also if that is a temporary one."""

    def __enter__(self) -> Self:
        self._server = ExitStack()
        self._server.enter_context(server_for_workers())
        self.init_kwargs |= {"runtime_env": _runtime_environment(), "logging_level": "ERROR"}
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        with self._server:
            super().__exit__(*exception)


def _runtime_environment() -> dict[str, Any]:
    """Of the cluster's processes. Ray would set one thread for each; as many as without Ray give the same sums.

    No other variables: Ray shows them to everybody who asks, and there are tokens among them.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return {
        "worker_process_setup_hook": "flows.runtime.worker_process.prepare",
        "env_vars": {"OMP_NUM_THREADS": threads},
    }
