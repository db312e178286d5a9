"""Locks that cannot be left behind: `flock`, which the kernel frees when its holder dies, kill -9 included."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import LeaseUnusable

#: one folder for all users of the host, and not in TMPDIR, which batch systems set anew for every job
LEASES = Path("/tmp/slimline-devices")

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


@contextmanager
def leased(name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold what the host has only once, such as "cuda:0", against every process and thread of it; yields True.

    With `wait=False` it yields False at once if somebody else holds it. Raises LeaseUnusable if the folder of leases
    cannot be used.
    """
    descriptor = _open_lease(LEASES / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.lock")
    try:
        yield _try(descriptor, wait)
    finally:
        # explicitly: a forked child that lives on (a data loader's worker) has a copy of the descriptor
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _try(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _acquire(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try(descriptor, wait=False):
                if not wait:
                    os.close(descriptor)
                    return None
                log.info("waiting for another process that holds %s", path)
                _try(descriptor, wait=True)
            if _is_current(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The holder deleted the file while we waited: what we hold locks nothing any more.
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _open_lease(path: Path) -> int:
    """Everybody on the host may lock the file; nobody but its owner may delete it."""
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.chmod(0o1777)
        try:
            # Linux refuses O_CREAT on a file that another user made in a folder like this one, so: without it first.
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
            os.fchmod(descriptor, 0o666)  # whatever the umask says
            return descriptor
    except OSError as error:
        raise LeaseUnusable(
            f"{path} cannot be opened ({error.strerror}), so nobody can tell whether its device is free; "
            f"let an administrator remove {path.parent} while no slimline runs"
        ) from error
