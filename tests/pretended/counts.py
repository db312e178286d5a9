"""What the pretended device has counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counts:
    """to_device, from_device: bytes that were copied; ..._copies: in so many copies. waits: synchronisations, by what
    the host waited for. operations: kernels that a device would have launched."""

    to_device: int = 0
    from_device: int = 0
    to_device_copies: int = 0
    from_device_copies: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    operations: int = 0

    @property
    def synchronisations(self) -> int:
        return sum(self.waits.values())


_open: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """The counts of what is done within."""
    counts = Counts()
    _open.append(counts)
    try:
        yield counts
    finally:
        _open.remove(counts)


def count_copy(num_bytes: int, *, to_device: bool, waits: bool) -> None:
    for counts in _open:
        if to_device:
            counts.to_device += num_bytes
            counts.to_device_copies += 1
        else:
            counts.from_device += num_bytes
            counts.from_device_copies += 1
    if waits:
        count_wait("copy to the device" if to_device else "copy from the device")


def count_wait(what: str) -> None:
    for counts in _open:
        counts.waits[what] += 1


def count_operation() -> None:
    for counts in _open:
        counts.operations += 1
