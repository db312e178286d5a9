"""Values of all calibration samples, kept in memory while the budget lasts and in files beyond it.

Shapes: N samples, B samples of one batch, L tokens per sample, F features.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

#: how the names of folders with activations begin
FOLDER_PREFIX = "activations-"


class Activations(ABC):
    """Batches of values, each found by the number of its first sample. sample_shape: (L, F)."""

    def __init__(self, sample_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.sample_shape, self.dtype = sample_shape, dtype

    @abstractmethod
    def put(self, start: int, values_BLF: Tensor) -> None:
        """Store the values of samples start, start + 1, ..."""

    @abstractmethod
    def get(self, start: int, stop: int) -> Tensor:
        """The values (stop - start, L, F) of a batch that was put, on the CPU; not to be changed in place."""

    def drop(self, start: int) -> None:  # noqa: B027 (files keep what they have)
        """Free a batch that is read no more, where that saves memory."""

    def close(self) -> None:  # noqa: B027 (memory goes by itself)
        """Free memory and file handles; nothing can be read afterwards."""


class MemoryActivations(Activations):
    """Batches in host memory, each as the tensor that was put."""

    def __init__(self, sample_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(sample_shape, dtype)
        self._batches: dict[int, Tensor] = {}

    def put(self, start: int, values_BLF: Tensor) -> None:
        """Hold a reference to the values, on the CPU."""
        self._batches[start] = values_BLF.cpu()

    def get(self, start: int, stop: int) -> Tensor:
        """The tensor itself, so start and stop must be those of one `put`."""
        values_BLF = self._batches[start]
        assert len(values_BLF) == stop - start, (start, stop, values_BLF.shape)
        return values_BLF

    def drop(self, start: int) -> None:
        """Free one batch."""
        del self._batches[start]

    def close(self) -> None:
        """Free all batches."""
        self._batches.clear()


class FileActivations(Activations):
    """Batches in one file, sample after sample; plain reads and writes, so that nothing stays resident.

    checksums: CRC-32 of every batch that was put, by its first sample.
    """

    def __init__(self, path: Path, sample_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(sample_shape, dtype)
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
        self._file.seek(start * self._sample_bytes)
        while data:  # an unbuffered file may take less than it is given
            data = data[self._file.write(data) :]

    def get(self, start: int, stop: int) -> Tensor:
        """Read the batch. Raises EOFError if the file ends before it."""
        values_BLF = torch.empty(stop - start, *self.sample_shape, dtype=self.dtype)
        buffer = _bytes(values_BLF)
        self._file.seek(start * self._sample_bytes)
        while buffer:
            count = self._file.readinto(buffer)
            if not count:
                raise EOFError(f"{self.path.name} ends before sample {stop}")
            buffer = buffer[count:]
        return values_BLF

    def checksum(self, start: int, stop: int) -> int:
        """CRC-32 of a batch as the file has it now. Raises EOFError as `get` does."""
        return zlib.crc32(_bytes(self.get(start, stop)))

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()


def _bytes(values: Tensor) -> memoryview:
    # numpy knows no bfloat16, but bytes it knows
    return values.view(-1).view(torch.uint8).numpy().data


class ActivationStore:
    """Allocates activations: in host memory up to a budget in bytes, then in files in a folder of its own.

    budget_bytes: None is no limit. parent: where the folder is made (default: the system's temporary folder); it goes
    when the store is closed.
    """

    def __init__(self, budget_bytes: int | None, parent: Path | None = None) -> None:
        self._budget, self._parent = budget_bytes, parent
        self._allocated: dict[Activations, int] = {}
        self._folder: Path | None = None
        self._count = 0

    def allocate(self, num_samples: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Activations:
        """Memory or a file for that many samples, to be given back with `free`."""
        num_bytes = num_samples * math.prod(sample_shape) * dtype.itemsize
        values: Activations
        if self._budget is None or sum(self._allocated.values()) + num_bytes <= self._budget:
            values = MemoryActivations(sample_shape, dtype)
        else:
            values, num_bytes = FileActivations(self._new_file(), sample_shape, dtype), 0
        self._allocated[values] = num_bytes
        return values

    def free(self, values: Activations) -> None:
        """Close what was allocated; its values are gone."""
        del self._allocated[values]
        values.close()
        if isinstance(values, FileActivations) and values.path.parent == self._folder:  # else it was moved away
            values.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for values in list(self._allocated):
            self.free(values)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=self._parent))
        self._count += 1
        return self._folder / str(self._count)
