"""What a stage asks before it begins, since it may be in another process: is this the flow's home, was it interrupted?

Ctrl-C reaches threads, processes of a cluster and cells of a night by a mark in the home: it says that a flow run, and
those that are part of it, start no further stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.context import TaskRunContext

from infra.disk import make_folder
from infra.errors import SettingsInvalid
from infra.settings import Settings, load_settings


class Interrupted(RuntimeError):
    """The run was interrupted before this stage, or this cell of a night, began."""


@contextmanager
def interrupted(settings: Settings, flow_run_id: UUID) -> Iterator[None]:
    """While the block runs, stages of the flow run that have not begun do not begin."""
    mark = _mark(settings, flow_run_id)
    make_folder(mark.parent)
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def refuse_interrupted(settings: Settings, *flow_runs: UUID | None) -> None:
    """Raise Interrupted if one of these flow runs, or that of the running task, was interrupted."""
    context = TaskRunContext.get()
    own = context.task_run.flow_run_id if context else None
    if any(_mark(settings, flow_run).exists() for flow_run in (own, *flow_runs) if flow_run is not None):
        raise Interrupted("the run was interrupted before this began; the same command goes on from here")


def refuse_elsewhere(settings: Settings) -> None:
    """Raise SettingsInvalid in a process of a cluster that would look for artifacts elsewhere than the flow does."""
    here = load_settings().home
    if here != settings.home:
        raise SettingsInvalid(
            f"this process of the cluster has SLIMLINE_HOME={here} and the flow has {settings.home}; start the "
            "cluster's processes with the flow's SLIMLINE_HOME, in a folder that all machines share"
        )


def _mark(settings: Settings, flow_run_id: UUID) -> Path:
    return settings.home / "interrupted" / str(flow_run_id)
