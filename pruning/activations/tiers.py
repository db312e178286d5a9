"""Where activations lie: on the device while its budget lasts, then in host memory, then in files. For the CPU the
first two are one. Where they lie changes no bit of them."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from pruning.activations.activations import CPU, FOLDER_PREFIX, Activations, FileActivations, MemoryActivations
from pruning.activations.pinned import Copies, PinnedActivations, has_streams


class ActivationStore:
    """Allocates activations: in memory up to budgets in bytes, then in files in a folder of its own.

    budget_bytes: of host memory, None is no limit. parent: where the folder is made (default: the system's temporary
    folder); it goes when the store is closed. device: where the activations are computed with. device_budget_bytes: of
    its memory, if it has its own.
    """

    def __init__(
        self,
        budget_bytes: int | None,
        parent: Path | None = None,
        *,
        device: torch.device = CPU,
        device_budget_bytes: int = 0,
    ) -> None:
        self._device, self._parent = device, parent
        self._tiers = [_Tier(budget_bytes, self._on_host)]
        if device.type != "cpu":
            on_device = _Tier(device_budget_bytes, lambda shape, dtype: MemoryActivations(shape, dtype, device))
            self._tiers.insert(0, on_device)
        self._copies = Copies(device) if has_streams(device) else None
        self._allocated: dict[Activations, _Tier | None] = {}
        self._folder: Path | None = None
        self._count = 0

    def allocate(
        self,
        num_samples: int,
        sample_shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        instead_of: Activations | None = None,
    ) -> Activations:
        """Room for that many samples, to be given back with `free`.

        instead_of: activations of which each batch is dropped before the new ones take more: they share a budget.
        """
        num_bytes = num_samples * math.prod(sample_shape) * dtype.itemsize
        for tier in self._tiers:
            if tier.has_room(num_bytes, instead_of):
                values = tier.make(sample_shape, dtype)
                tier.enter(values, num_bytes, instead_of)
                self._allocated[values] = tier
                return values
        in_file = FileActivations(self._new_file(), sample_shape, dtype, self._device)
        self._allocated[in_file] = None
        return in_file

    def free(self, values: Activations) -> None:
        """Close what was allocated; its values are gone."""
        tier = self._allocated.pop(values)
        if tier is not None:
            tier.leave(values)
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

    def _on_host(self, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Activations:
        if self._copies is not None:
            return PinnedActivations(sample_shape, dtype, self._copies)
        return MemoryActivations(sample_shape, dtype, self._device, on_host=True)

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=self._parent))
        self._count += 1
        return self._folder / str(self._count)


class _Tier:
    """One kind of memory with its budget in bytes, None for no limit."""

    def __init__(self, budget: int | None, make: Callable[[tuple[int, ...], torch.dtype], Activations]) -> None:
        self._budget, self.make = budget, make
        self._bytes: dict[Activations, int] = {}
        self._heirs: dict[Activations, Activations] = {}

    def has_room(self, num_bytes: int, instead_of: Activations | None) -> bool:
        """Whether so many bytes fit, those of `instead_of` going meanwhile."""
        if self._budget is None:
            return True
        taken, going = 0, 0
        for values, count in self._bytes.items():
            if values is instead_of:
                going = count
            elif values not in self._heirs.values():  # of two that share their place the larger one counts
                heir = self._heirs.get(values)
                taken += max(count, self._bytes[heir] if heir else 0)
        return taken + max(num_bytes, going) <= self._budget

    def enter(self, values: Activations, num_bytes: int, instead_of: Activations | None) -> None:
        """Count the bytes of what was made."""
        self._bytes[values] = num_bytes
        if instead_of is not None and instead_of in self._bytes:
            self._heirs[instead_of] = values

    def leave(self, values: Activations) -> None:
        """Count them no more."""
        del self._bytes[values]
        self._heirs.pop(values, None)
