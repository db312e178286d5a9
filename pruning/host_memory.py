"""Memory of the host: how much of it activations may take, and what training on its own processors keeps of it.

By default glibc maps every large tensor from the kernel and gives it back when it is freed, so that a training step
faults and zeroes all its pages anew: a tenth to more than a half of the step's time, by how dear a page fault is on
the machine. So what a step frees is kept for the next step.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h

#: what malloc's own adaptive thresholds end at (mallopt(3), DEFAULT_MMAP_THRESHOLD_MAX on 64 bits; twice that)
_USUAL = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
#: larger blocks, a whole embedding in float32 for example, are still mapped each by itself; -1: never trimmed
_KEPT = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: -1}

#: of the memory that is free, what activations may take before they lie in files
_ACTIVATION_SHARE = 0.5

_lock = threading.Lock()
_users = 0


def activation_budget(gib: float | None = None, *, num_processes: int = 1) -> int:
    """Bytes of host memory for activations of each of so many processes: what was asked for, or else half of what is
    free now."""
    if gib is not None:
        return int(gib * 2**30)
    return int(_ACTIVATION_SHARE * psutil.virtual_memory().available / num_processes)


def one_arena() -> None:
    """Let all threads allocate from the main arena, before there are any: the others hold no block above 64 MiB, and
    map what is larger. Does nothing without glibc."""
    _set({_ARENA_MAX: 1})


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Within it freed memory stays with the process, if the device is the CPU; in the end it is given back.

    In threads other than the main one it takes effect after `one_arena`.
    """
    global _users
    if device.type != "cpu":
        yield
        return
    with _lock:
        _users += 1
        _set(_KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _set(_USUAL)
                _call("malloc_trim", 0)


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        _call("mallopt", option, value)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)  # neither musl nor macOS has them
    if function is not None:
        function(*arguments)
