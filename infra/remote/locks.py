"""A lock on an object store: a file that only one can create, renewed while its holder lives.

Nobody frees the lock of a dead holder, so who waits takes a lock that has not been renewed for two minutes, by the
waiter's own clock. Two things are therefore possible and do no harm, since artifacts are complete or absent: a holder
that stood still for so long (a suspended machine, no network) finds its lock taken, and two waiters that take the same
dead lock within one request may both believe that they have it. Then an artifact is computed twice.
"""

from __future__ import annotations

import json
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
class Pace:
    """Seconds: between two renewals, until a lock without one is taken, between two looks of who waits."""

    renew: float = 30.0
    expire: float = 120.0
    look: float = 5.0


PACE = Pace()


@contextmanager
def remotely_locked(files: RemoteFiles, path: str, pace: Pace = PACE) -> Iterator[None]:
    """Hold the lock file `path` against everybody who shares the object store; waits for who has it."""
    lock = _Lock(files, path)
    lock.take(pace)
    stop = threading.Event()
    renewer = threading.Thread(target=lock.renew_until, args=(stop, pace), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join()
        lock.give_back()


class _Lock:
    def __init__(self, files: RemoteFiles, path: str) -> None:
        self._files, self._path = files, path
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
        self._beats = 0

    def take(self, pace: Pace) -> None:
        seen, since, told = None, time.monotonic(), False
        while not self._files.create(self._path, self._content()):
            now = self._files.read(self._path)
            if now != seen or now is None:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > pace.expire:
                self._take_from_the_dead(now)
                continue
            if not told:
                log.info("waiting for %s, which %s holds", self._path, _holder(now))
                told = True
            time.sleep(pace.look)

    def renew_until(self, stop: threading.Event, pace: Pace) -> None:
        while not stop.wait(pace.renew):
            try:
                if not self._ours():
                    log.warning("%s was taken by somebody else: what is made now may be made twice", self._path)
                    return
                self._beats += 1
                self._files.write(self._path, self._content())
            except Exception as error:  # the network; the next renewal may succeed before the lock expires
                log.warning("%s could not be renewed (%s)", self._path, type(error).__name__)

    def give_back(self) -> None:
        # nobody need know: it expires
        with suppress(Exception):
            if self._ours():
                self._files.remove(self._path)

    def _take_from_the_dead(self, seen: bytes) -> None:
        log.warning("%s of %s was not renewed: taken from it", self._path, _holder(seen))
        if self._files.read(self._path) == seen:
            self._files.remove(self._path)

    def _ours(self) -> bool:
        return _holder(self._files.read(self._path)) == self._holder

    def _content(self) -> bytes:
        return json.dumps({"holder": self._holder, "beats": self._beats}).encode()


def _holder(content: bytes | None) -> str:
    try:
        return str(json.loads(content or b"{}").get("holder", "somebody"))
    except (ValueError, AttributeError):
        return "somebody"
