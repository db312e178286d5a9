"""Servers that a killed run left behind: Prefect's temporary server does not notice when its run is killed with -9,
nor does the one of `slimline serve`."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from flows.servers import STARTED_BY_US

log = logging.getLogger("slimline")

_TEMPORARY = b"prefect.server.api.server:create_app"
_OURS = b"PREFECT__STARTED_BY=" + STARTED_BY_US["PREFECT__STARTED_BY"].encode()
_PROC = Path("/proc")
_PATIENCE = 10.0


def end_orphaned_servers(storage: str) -> int:
    """End Prefect servers that killed runs with the same result storage had started; returns how many there were.

    One is an orphan if the process that started it is gone, so that init has adopted it. Where there is no /proc
    (macOS) nothing is looked for.
    """
    marker = f"PREFECT_LOCAL_STORAGE_PATH={storage}".encode()
    if b"slimline" in _read(_PROC / "1" / "cmdline"):
        return 0  # in a container a run may be process 1 itself, and its server looks like an orphan
    ended = []
    for folder in _processes():
        environment = _read(folder / "environ").split(b"\0")
        ours = _TEMPORARY in _read(folder / "cmdline") or _OURS in environment
        if ours and marker in environment and _parent(folder) == 1:
            log.info("ending the server of a run that was killed (process %s)", folder.name)
            os.kill(int(folder.name), signal.SIGTERM)
            ended.append(folder)
    deadline = time.monotonic() + _PATIENCE  # the next server may want its port
    while any(_read(folder / "cmdline") for folder in ended) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(ended)


def _processes() -> Iterator[Path]:
    return (folder for folder in _PROC.glob("[0-9]*") if folder.name.isdigit())


def _parent(folder: Path) -> int | None:
    for line in _read(folder / "status").splitlines():
        if line.startswith(b"PPid:"):
            return int(line.split()[1])
    return None


def _read(path: Path) -> bytes:
    """Content, or nothing for a process that ended meanwhile or belongs to somebody else."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
