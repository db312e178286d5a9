"""A lock on an object store: a file that only one can create, renewed while its holder lives.

Nobody frees the lock of a dead holder: who waits takes a lock that has not been renewed for two minutes, by its own
clock. So a holder that stood still for so long (a suspended machine, no network) loses its lock, and two waiters that
take the same dead lock within one request may both believe that they have it. Then an artifact is computed twice, which
does no harm: it is complete or absent.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from infra.remote.files import RemoteFiles

log = logging.getLogger("slimline")


@dataclass(frozen=True)
class LockTiming:
    """Seconds: between two renewals, until a lock without one is taken, between two looks of who waits."""

    renew: float = 30.0
    expire: float = 120.0
    look: float = 5.0


LOCK_TIMING = LockTiming()


@contextmanager
def remotely_locked(files: RemoteFiles, path: str, timing: LockTiming = LOCK_TIMING) -> Iterator[None]:
    """Hold the lock file `path` against everybody who shares the object store; waits for who has it."""
    holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
    _take(files, path, holder, timing)
    released = threading.Event()
    renewer = threading.Thread(target=_renew, args=(files, path, holder, timing.renew, released), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        released.set()
        renewer.join()
        with suppress(Exception):  # what is left behind expires
            if _holder(files.read(path)) == holder:
                files.remove(path)


def _take(files: RemoteFiles, path: str, holder: str, timing: LockTiming) -> None:
    seen, since = None, time.monotonic()
    while not files.create(path, _content(holder)):
        found = files.read(path)
        if found != seen:
            if seen is None:
                log.info("waiting for %s, which %s holds", path, _holder(found))
            seen, since = found, time.monotonic()
        elif found is not None and time.monotonic() - since > timing.expire:
            log.warning("%s of %s was not renewed: taken from it", path, _holder(found))
            files.remove(path)
            continue
        time.sleep(timing.look)


def _renew(files: RemoteFiles, path: str, holder: str, every: float, released: threading.Event) -> None:
    while not released.wait(every):
        try:
            if _holder(files.read(path)) != holder:
                log.warning("%s was taken by somebody else: what is made now may be made twice", path)
                return
            files.write(path, _content(holder))
        except Exception as error:  # the network; the next renewal may succeed before the lock expires
            log.warning("%s could not be renewed (%s)", path, type(error).__name__)


def _content(holder: str) -> bytes:
    return f"{holder} {time.time()}".encode()  # another one at each renewal


def _holder(content: bytes | None) -> str:
    return (content or b"").decode(errors="replace").partition(" ")[0] or "somebody"
