"""How a process that computes for another one ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def end_with_parent() -> None:
    """Ctrl-C is the parent's affair; when the parent is gone, however it went, this process goes too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    _end_after(parent.join)


@contextmanager
def lifeline() -> Iterator[int]:
    """A descriptor to hand to a process that is not of multiprocessing (`pass_fds`): see `end_with_lifeline`."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def end_with_lifeline(descriptor: int) -> None:
    """The same as `end_with_parent` in the process that was handed the descriptor."""
    _end_after(lambda: os.read(descriptor, 1))


def _end_after(wait: Callable[[], object]) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere there are no handlers
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
