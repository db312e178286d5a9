"""What a stage asks before it begins, since it may be in another process: is this the flow's home, was it interrupted?

Ctrl-C reaches processes of a cluster by a mark in the home: it says that a flow run starts no further stage.
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
    """The run was interrupted before this stage began."""


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


def refuse_interrupted(settings: Settings) -> None:
    """Raise Interrupted in a stage whose flow run was interrupted."""
    context = TaskRunContext.get()
    flow_run_id = context.task_run.flow_run_id if context else None
    if flow_run_id is not None and _mark(settings, flow_run_id).exists():
        raise Interrupted("the run was interrupted before this stage began; the same command goes on from here")


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
