"""What a stage asks before it begins and while it runs, since it may be in another process: is this the flow's home,
was the run interrupted?

Signals reach threads, processes of a cluster and cells of a night by marks in the home. One says that a flow run, and
those that are part of it, start no further stage; another one that running stages are to end as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.context import TaskRunContext

from infra.errors import SettingsInvalid
from infra.filesystem.disk import make_folder
from infra.settings import Settings, load_settings


class Interrupted(RuntimeError):
    """The run was interrupted before this stage, or this cell of a night, began, or while it ran."""


_saving = 0
_counting = threading.Lock()


@contextmanager
def interrupted(settings: Settings, flow_run_id: UUID, *, at_once: bool = False) -> Iterator[None]:
    """While the block runs, stages of the flow run that have not begun do not begin; at_once: those that run end when
    they next tell how far they are."""
    marks = _marks(settings, flow_run_id)[: 2 if at_once else 1]
    make_folder(marks[0].parent)
    for mark in marks:
        mark.touch()
    try:
        yield
    finally:
        not_interrupted(settings, flow_run_id)


def not_interrupted(settings: Settings, flow_run_id: UUID) -> None:
    """Take the marks away, also those of a process that was killed before it could: the flow run may be a retry."""
    for mark in _marks(settings, flow_run_id):
        mark.unlink(missing_ok=True)


def refuse_interrupted(settings: Settings, *flow_runs: UUID | None) -> None:
    """Raise Interrupted if one of these flow runs, or that of the running task, was interrupted."""
    if any(_marks(settings, flow_run)[0].exists() for flow_run in _with_own(flow_runs)):
        raise Interrupted("the run was interrupted before this began; the same command goes on from here")


def ended_by_marks(settings: Settings, *flow_runs: UUID | None) -> Callable[[str], None]:
    """For a running stage: a function that is called with how far it is, and raises Interrupted if it is to end."""
    marks = [_marks(settings, flow_run)[1] for flow_run in _with_own(flow_runs)]

    def refuse(reached: str) -> None:
        if any(mark.exists() for mark in marks):
            raise Interrupted(f"interrupted at {reached}; the same command goes on from here")

    return refuse


@contextmanager
def something_to_save() -> Iterator[None]:
    """While the block runs, this process has a stage that saves what it has done when it is interrupted."""
    global _saving
    with _counting:
        _saving += 1
    try:
        yield
    finally:
        with _counting:
            _saving -= 1


def anything_to_save() -> bool:
    """Whether there is such a stage now."""
    return _saving > 0


def refuse_elsewhere(settings: Settings) -> None:
    """Raise SettingsInvalid in a process of a cluster that would look for artifacts elsewhere than the flow does."""
    here = load_settings().home
    if here != settings.home:
        raise SettingsInvalid(
            f"this process of the cluster has SLIMLINE_HOME={here} and the flow has {settings.home}; start the "
            "cluster's processes with the flow's SLIMLINE_HOME, in a folder that all machines share"
        )


def _with_own(flow_runs: tuple[UUID | None, ...]) -> list[UUID]:
    context = TaskRunContext.get()
    own = context.task_run.flow_run_id if context else None
    return [flow_run for flow_run in (own, *flow_runs) if flow_run is not None]


def _marks(settings: Settings, flow_run_id: UUID) -> tuple[Path, Path]:
    """That no further stage begins; that running ones end."""
    mark = settings.home / "interrupted" / str(flow_run_id)
    return mark, mark.with_suffix(".now")
