"""Progress of long stages: a bar in a terminal, a progress artifact in Prefect's UI, and who else takes note."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from tqdm import tqdm

#: seconds between two updates of the artifact: each is a call to Prefect's server
_INTERVAL = 2.0

log = logging.getLogger("slimline")


class Progress(Protocol):
    """Called with the share done, in [0, 1], and a few words."""

    def __call__(self, share: float, message: str) -> None:
        """Take note. Raises Interrupted if the stage is to end here, before it is finished."""
        ...


def settle_bars() -> None:
    """Have tqdm make its lock now.

    `tqdm.contrib.concurrent`, which datasets and the hub's client use, makes one where it finds none and takes it away
    afterwards, under the feet of other threads' bars.
    """
    tqdm.get_lock()  # type: ignore[no-untyped-call]


@contextmanager
def stage_progress(
    stage: str,
    refuse: Callable[[str], None] = lambda reached: None,
    note: Callable[[float, str], None] = lambda share, message: None,
) -> Iterator[Progress]:
    """A Progress for one running stage; the bar closes with the block. Outside a Prefect task only the bar is shown.

    refuse: called with the words while the stage is not finished; what it raises passes on. note: called with the
    share and the words each time.
    """
    form = "{l_bar}{bar}| {postfix}"
    bar = tqdm(total=100, desc=stage, unit="%", file=sys.stderr, disable=None, leave=False, bar_format=form)
    artifact_id: UUID | None = None
    if TaskRunContext.get() is not None:
        with _not_worth_a_stage(stage):
            artifact_id = cast("UUID", create_progress_artifact(progress=0.0, description=stage))
    reported = time.monotonic()

    def tell(share: float, message: str) -> None:
        nonlocal reported
        if share < 1:
            refuse(message)
        note(share, message)
        bar.set_postfix_str(message, refresh=False)
        bar.n = min(100.0, 100 * share)
        bar.refresh()
        if artifact_id is not None and time.monotonic() - reported > _INTERVAL:
            reported = time.monotonic()
            words = f"{stage}: {message}"
            with _not_worth_a_stage(stage):
                update_progress_artifact(artifact_id, progress=min(100.0, 100 * share), description=words)

    try:
        yield tell
        if artifact_id is not None:
            with _not_worth_a_stage(stage):
                update_progress_artifact(artifact_id, progress=100.0, description=f"{stage}: done")
    finally:
        bar.close()


@contextmanager
def _not_worth_a_stage(stage: str) -> Iterator[None]:
    """A server that is gone, perhaps for a moment, must not end hours of work for the sake of a bar in its pages."""
    try:
        yield
    except Exception as error:  # of its client, of its answer
        log.debug("%s: its progress could not be told to Prefect's server: %s", stage, error)
