"""Locks that cannot be left behind: `flock`, which the kernel frees when its holder dies, kill -9 included."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("slimline")


@contextmanager
def flocked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` exclusively; yields True.

    With `wait=False` it yields False at once if somebody else holds it. Not reentrant: a second call in the same
    process waits too. Only the holder may delete the file. Works between threads, processes and containers of a host.
    """
    descriptor = _acquire(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _acquire(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor, path, wait):
                os.close(descriptor)
                return None
            if _is_current(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The holder deleted the file while we waited: what we hold locks nothing any more.
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        log.info("waiting for another process that holds %s", path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
