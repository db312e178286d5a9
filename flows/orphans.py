"""Servers that a killed run left behind: Prefect's temporary server does not notice when its run is killed with -9."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("slimline")

_SERVER = b"prefect.server.api.server:create_app"
_PROC = Path("/proc")


def end_orphaned_servers(storage: str) -> int:
    """End temporary Prefect servers of killed runs with the same result storage; returns how many there were.

    One is an orphan if the process that started it is gone, so that init has adopted it. Where there is no /proc
    (macOS) nothing is looked for.
    """
    marker = f"PREFECT_LOCAL_STORAGE_PATH={storage}".encode()
    if b"slimline" in _read(_PROC / "1" / "cmdline"):
        return 0  # in a container a run may be process 1 itself, and its server looks like an orphan
    ended = 0
    for folder in _processes():
        ours = _SERVER in _read(folder / "cmdline") and marker in _read(folder / "environ").split(b"\0")
        if ours and _parent(folder) == 1:
            log.info("ending the server of a run that was killed (process %s)", folder.name)
            os.kill(int(folder.name), signal.SIGTERM)
            ended += 1
    return ended


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
