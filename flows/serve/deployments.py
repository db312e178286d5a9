"""The flows that schedules, workers and Prefect's pages run. Their parameters are plain JSON, so that Prefect can store
them and run the same flow run again: what is in the store by then is not run again.

Importing this module prepares a process that Prefect started (prefect.yaml names the flows by this module).
"""

from __future__ import annotations

import logging

from flows.runtime.environment import prepare_process, started_by_prefect
from flows.runtime.flow_processes import end_with_server

if started_by_prefect():
    prepare_process()
    end_with_server()

from prefect import flow
from prefect.context import FlowRunContext

from flows.night.nightly import nightly, on_runner
from flows.run.compress import compress
from flows.run.outcome import RunResult
from flows.runtime.task_runners import create_runner
from flows.spec.load import load_spec
from infra.settings import load_settings

__all__ = ["nightly", "run"]

log = logging.getLogger("slimline")

if started_by_prefect():
    nightly = on_runner(load_settings().runner, load_settings())


@flow(name="run", flow_run_name="{spec}", persist_result=False)
def run(spec: str, overrides: tuple[str, ...] = (), refresh: tuple[str, ...] = ()) -> RunResult:
    """One run of a spec.

    spec: a shipped name, or a path on the machine that runs it. overrides: such as "steps.0.sparsity=0.5". refresh:
    stages to run again although they are in the store; a retry leaves those that the first try got done. Raises
    SpecError, and all that `compress` raises.
    """
    context = FlowRunContext.get()
    created = context.flow_run.created if context and context.flow_run else None
    settings = load_settings()
    runner = create_runner(settings.runner, settings)
    try:
        return compress.with_options(task_runner=runner)(load_spec(spec, overrides), refresh, created)
    except Exception as error:
        log.error("run %s: %s", spec, error)  # Prefect keeps it for its pages and says nothing where it runs
        raise
