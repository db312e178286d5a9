"""Activations of an accelerator in page-locked host memory, copied both ways on streams of their own.

While the device computes with one batch, the next one arrives and the one before leaves. Of each direction two batches
at most are on the device beside those that are computed with.

Shapes: B samples of one batch, L tokens per sample, F features.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pruning.activations.activations import Activations

log = logging.getLogger("slimline")

#: batches on their way to the host before the device waits for the oldest one
_LEAVING = 2
#: of a buffer, what a last piece that is rounded up may waste
_WASTE = 1 / 16


def has_streams(device: torch.device) -> bool:
    """Whether the device copies beside its computations (CUDA, XPU); MPS shares its memory with the host."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


@dataclass
class _Held:
    """A batch on the host: its bytes in pieces, and the event after which they are there."""

    pieces: list[Tensor]
    there: Any


class Copies:
    """The two copy streams of one device; all its pinned activations share them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._module = device, torch.get_device_module(device)
        self._into, self._out_of = self._module.Stream(device), self._module.Stream(device)
        self._leaving: deque[tuple[Tensor, Any]] = deque()

    def to_host(self, values: Tensor, pieces: list[Tensor]) -> Any:
        """Begin to copy the bytes of device values into the pieces; returns the event of its end."""
        if len(self._leaving) == _LEAVING:
            # the memory of what has left is free for what is computed from now on
            _, gone = self._leaving.popleft()
            self._current.wait_event(gone)
        self._out_of.wait_stream(self._current)
        with self._module.stream(self._out_of):
            _copy(values, pieces, to_pieces=True)
            there = self._out_of.record_event()
        self._leaving.append((values, there))
        return there

    def kept(self, values: Tensor, pieces: list[Tensor]) -> Any:
        """Copy the bytes of host values into the pieces, which nothing else reads; returns an event that is past."""
        _copy(values, pieces, to_pieces=True)
        return self._out_of.record_event()

    def to_device(self, held: _Held, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Begin to copy a batch to the device; the values may be used after the event."""
        # of the computing stream's memory, which may still be in use by what was enqueued there
        values = torch.empty(shape, dtype=dtype, device=self.device)
        self._into.wait_stream(self._current)
        self._into.wait_event(held.there)
        with self._module.stream(self._into):
            _copy(values, held.pieces, to_pieces=False)
            return values, self._into.record_event()

    def wait(self, event: Any) -> None:
        """Let what is computed from now on begin after the event."""
        self._current.wait_event(event)

    def finish(self) -> None:
        """Wait for all copies to the host, whose values are then free."""
        while self._leaving:
            self._leaving.popleft()[1].synchronize()

    @property
    def _current(self) -> Any:
        return self._module.current_stream(self.device)


class PinnedActivations(Activations):
    """Batches in pinned host memory; one that is read after its predecessor was asked for ahead."""

    def __init__(self, sample_shape: tuple[int, ...], dtype: torch.dtype, copies: Copies) -> None:
        super().__init__(sample_shape, dtype, copies.device)
        self._copies = copies
        self._held: dict[int, _Held] = {}
        self._stops: dict[int, int] = {}
        self._arriving: dict[int, tuple[Tensor, Any]] = {}
        self._last_stop = 0

    def put(self, start: int, values_BLF: Tensor) -> None:
        """Begin to copy the values; they must not be changed in place afterwards."""
        self._forget(start)
        values_BLF = values_BLF.to(self.dtype).contiguous()
        held = self._held.pop(start, None)
        num_bytes, from_host = values_BLF.numel() * self.dtype.itemsize, values_BLF.device.type == "cpu"
        if held and not from_host and sum(map(len, held.pieces)) == num_bytes:
            pieces = held.pieces
        else:  # a copy from the old ones may be under way
            pieces = list(_pinned(num_bytes))
        there = (self._copies.kept if from_host else self._copies.to_host)(values_BLF, pieces)
        self._held[start] = _Held(pieces, there)
        self._stops[start] = start + len(values_BLF)

    def get(self, start: int, stop: int) -> Tensor:
        """The batch on the device; start and stop must be those of one `put`."""
        assert self._stops[start] == stop, (start, stop, self._stops[start])
        values_BLF, there = self._arriving.pop(start) if start in self._arriving else self._arrive(start)
        if start in (0, self._last_stop) and stop in self._held and stop not in self._arriving:
            self._arriving[stop] = self._arrive(stop)  # read in order: the next one is wanted soon
        self._last_stop = stop
        self._copies.wait(there)
        return values_BLF

    def on_host(self, start: int, stop: int) -> Tensor:
        """A copy on the CPU, not by way of the device."""
        assert self._stops[start] == stop, (start, stop, self._stops[start])
        held = self._held[start]
        held.there.synchronize()
        values_BLF = torch.empty(stop - start, *self.sample_shape, dtype=self.dtype)
        _copy(values_BLF, held.pieces, to_pieces=False)
        return values_BLF

    def drop(self, start: int) -> None:
        """Free one batch; its memory is used again when the copies from it have ended."""
        self._forget(start)
        del self._held[start]

    def close(self) -> None:
        """Free all batches."""
        for start in list(self._arriving):
            self._forget(start)
        self._copies.finish()
        self._held.clear()

    def _arrive(self, start: int) -> tuple[Tensor, Any]:
        shape = (self._stops[start] - start, *self.sample_shape)
        return self._copies.to_device(self._held[start], shape, self.dtype)

    def _forget(self, start: int) -> None:
        """What was asked for ahead and is not wanted: its memory is free after the copy."""
        if (arriving := self._arriving.pop(start, None)) is not None:
            self._copies.wait(arriving[1])


def _copy(values: Tensor, pieces: list[Tensor], *, to_pieces: bool) -> None:
    if not pieces:
        return
    parts = torch.split(values.view(-1).view(torch.uint8), [len(piece) for piece in pieces])
    for part, piece in zip(parts, pieces, strict=True):
        target, source = (piece, part) if to_pieces else (part, piece)
        target.copy_(source, non_blocking=True)


def _pinned(num_bytes: int) -> Iterator[Tensor]:
    """Buffers of so many bytes in all. The allocator rounds each up to a power of two: pieces are such powers, the last
    one what little is left."""
    left = num_bytes
    while left:
        size = 1 << (left.bit_length() - 1)
        if 2 * size - left <= _WASTE * num_bytes:
            size = left
        yield _pinned_buffer(size)
        left -= size


def _pinned_buffer(num_bytes: int) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _warn(str(error).partition("\n")[0])
        return torch.empty(num_bytes, dtype=torch.uint8)


@cache
def _warn(reason: str) -> None:
    log.warning("host memory cannot be page-locked (%s): copies to and from the device are waited for", reason)
