"""Values of all calibration samples between sub-layers, in memory of a device or in a file; `tiers` chooses.

Shapes: N samples, B samples of one batch, L tokens per sample, F features.
"""

from __future__ import annotations

import math
import os
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

#: how the names of folders with activations begin
FOLDER_PREFIX = "activations-"

CPU = torch.device("cpu")


class Activations(ABC):
    """Batches of values, each found by the number of its first sample. sample_shape: (L, F). device: where they are
    computed with. resident: whether they lie there, so that reading costs nothing."""

    resident = False

    def __init__(self, sample_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.sample_shape, self.dtype, self.device = sample_shape, dtype, device

    @abstractmethod
    def put(self, start: int, values_BLF: Tensor) -> None:
        """Store the values of samples start, start + 1, ..."""

    @abstractmethod
    def get(self, start: int, stop: int) -> Tensor:
        """The values (stop - start, L, F) of a batch that was put, on `device`; not to be changed in place."""

    def on_host(self, start: int, stop: int) -> Tensor:
        """The same on the CPU, by way of the device only if it lies there."""
        return self.get(start, stop).cpu()

    def drop(self, start: int) -> None:  # noqa: B027 (files keep what they have)
        """Free a batch that is read no more, where that saves memory."""

    def close(self) -> None:  # noqa: B027 (memory goes by itself)
        """Free memory and file handles; nothing can be read afterwards."""


class MemoryActivations(Activations):
    """Batches in the memory of the device, or of the host if `on_host`, each as the tensor that was put."""

    def __init__(
        self, sample_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU, *, on_host: bool = False
    ) -> None:
        super().__init__(sample_shape, dtype, device)
        self._place = CPU if on_host else device
        self.resident = self._place == device
        self._batches: dict[int, Tensor] = {}

    def put(self, start: int, values_BLF: Tensor) -> None:
        """Hold a reference to the values, in the memory that is meant."""
        self._batches[start] = values_BLF.to(self._place)

    def get(self, start: int, stop: int) -> Tensor:
        """The tensor itself if it lies on the device, so start and stop must be those of one `put`."""
        return self._batch(start, stop).to(self.device)

    def on_host(self, start: int, stop: int) -> Tensor:
        """The tensor itself if it lies on the host."""
        return self._batch(start, stop).cpu()

    def drop(self, start: int) -> None:
        """Free one batch."""
        del self._batches[start]

    def close(self) -> None:
        """Free all batches."""
        self._batches.clear()

    def _batch(self, start: int, stop: int) -> Tensor:
        values_BLF = self._batches[start]
        assert len(values_BLF) == stop - start, (start, stop, values_BLF.shape)
        return values_BLF


class FileActivations(Activations):
    """Batches in one file, sample after sample; plain reads and writes, so that nothing stays resident.

    checksums: CRC-32 of every batch that was put, by its first sample.
    """

    def __init__(
        self, path: Path, sample_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
    ) -> None:
        super().__init__(sample_shape, dtype, device)
        self.path = path
        self.checksums: dict[int, int] = {}
        self._sample_bytes = math.prod(sample_shape) * dtype.itemsize
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)

    def move(self, path: Path) -> None:
        """Give the file another name, on the same disk; reading and writing go on."""
        self.path = self.path.rename(path)

    def put(self, start: int, values_BLF: Tensor) -> None:
        """Write the batch to its place in the file."""
        assert values_BLF.shape[1:] == self.sample_shape, (values_BLF.shape, self.sample_shape)
        data = _bytes(values_BLF.to(self.dtype).cpu().contiguous())
        self.checksums[start] = zlib.crc32(data)
        place = start * self._sample_bytes
        while data:  # an unbuffered file may take less than it is given
            count = os.pwrite(self._file.fileno(), data, place)
            data, place = data[count:], place + count

    def get(self, start: int, stop: int) -> Tensor:
        """Read the batch. Raises EOFError if the file ends before it."""
        return self.on_host(start, stop).to(self.device)

    def on_host(self, start: int, stop: int) -> Tensor:
        """Read the batch. Raises EOFError if the file ends before it."""
        values_BLF = torch.empty(stop - start, *self.sample_shape, dtype=self.dtype)
        buffer, place = _bytes(values_BLF), start * self._sample_bytes
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], place)
            if not count:
                raise EOFError(f"{self.path.name} ends before sample {stop}")
            buffer, place = buffer[count:], place + count
        return values_BLF

    def checksum(self, start: int, stop: int) -> int:
        """CRC-32 of a batch as the file has it now. Raises EOFError as `get` does."""
        return zlib.crc32(_bytes(self.on_host(start, stop)))

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()


def _bytes(values: Tensor) -> memoryview:
    # numpy knows no bfloat16, but bytes it knows
    return values.view(-1).view(torch.uint8).numpy().data
