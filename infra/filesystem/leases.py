"""Leases of what a host has only once: a lock of the kernel per thing, which ends with its holder, kill -9 included.

They lie in one folder for all users of the host, and not in TMPDIR, which batch systems set anew for every job.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import LeaseUnusable

FOLDER = Path("/tmp/slimline-devices")

# Everybody may lock, nobody but its owner may delete what is there.
_FOLDER_MODE = 0o1777
_FILE_MODE = 0o666


@contextmanager
def leased(name: str, *, wait: bool = True, folder: Path | None = None) -> Iterator[bool]:
    """Hold the thing `name` against every process and thread of the host; yields True.

    With `wait=False` it yields False at once if somebody else holds it. Raises LeaseUnusable if the folder cannot be
    used.
    """
    descriptor = _open((folder or FOLDER) / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.lock")
    try:
        yield _lock(descriptor, wait)
    finally:
        # explicitly: a forked child that lives on (a data loader's worker) has a copy of the descriptor
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _open(path: Path) -> int:
    try:
        _make_folder(path.parent)
        try:
            # Linux refuses O_CREAT on a file that another user made in a folder like this one, so: without it first.
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, _FILE_MODE)
            os.fchmod(descriptor, _FILE_MODE)  # whatever the umask says
            return descriptor
    except OSError as error:
        raise LeaseUnusable(
            f"{path} cannot be opened ({error.strerror}), so nobody can tell whether its device is free; "
            f"let an administrator remove {path.parent} while no slimline runs"
        ) from error


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(_FOLDER_MODE)
