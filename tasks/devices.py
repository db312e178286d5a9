"""Which device a stage computes on: one stage per accelerator at a time, stages on different ones side by side."""

from __future__ import annotations

import os
import platform
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import SettingsInvalid

if TYPE_CHECKING:
    import torch

BALANCED = "balanced"


@dataclass(frozen=True)
class Placement:
    """Where a stage puts its model: on one device, or (device_map) spread over all of them.

    device: where computation happens, for a spread model the first device.
    """

    device: torch.device
    device_map: str | None = None

    @property
    def load(self) -> dict[str, Any]:
        """Keyword arguments for load_checkpoint."""
        return {"device_map": self.device_map} if self.device_map else {"device": self.device}


class DevicePool:
    """Hands out places; who asks while all are taken waits. Shared by the threads of one run."""

    def __init__(self, places: tuple[Placement, ...]) -> None:
        self._places = places
        self._free: queue.SimpleQueue[Placement] = queue.SimpleQueue()
        self._taking_all = threading.Lock()
        for place in places:
            self._free.put(place)

    @contextmanager
    def one(self) -> Iterator[Placement]:
        """A place of one's own for the length of the block."""
        place = self._free.get()
        try:
            yield place
        finally:
            self._free.put(place)

    @contextmanager
    def all(self) -> Iterator[Placement]:
        """Every place at once (a Trainer uses all visible GPUs); the first one is named."""
        with self._taking_all:  # two that wait for all of them would each hold some
            taken = [self._free.get() for _ in self._places]
        try:
            yield self._places[0]
        finally:
            for place in taken:
                self._free.put(place)


@cache
def pool(setting: str) -> DevicePool:
    """The pool of this process for a `device` setting."""
    import torch

    names = device_names(setting)
    if setting == BALANCED:
        return DevicePool((Placement(torch.device(names[0]), device_map="auto"),))
    return DevicePool(tuple(Placement(torch.device(name)) for name in names))


def device_names(setting: str) -> tuple[str, ...]:
    """Torch device names for a setting: "auto" is every CUDA device, or the CPU if there is none; "balanced" the same,
    each model spread over them. Raises SettingsInvalid for a device this machine does not have."""
    import torch

    if setting in ("auto", BALANCED):
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or ("cpu",)
    if setting.startswith("cuda"):
        index = int(setting.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise SettingsInvalid(
                f"SLIMLINE_DEVICE={setting}: this machine has {torch.cuda.device_count()} CUDA devices; "
                f"set it to auto, balanced, cpu or one of them"
            )
        return (f"cuda:{index}",)
    try:
        torch.empty(0, device=setting)
    except (RuntimeError, AssertionError) as error:
        raise SettingsInvalid(
            f"SLIMLINE_DEVICE={setting}: torch has no such device here; set it to auto or cpu"
        ) from error
    return (setting,)


def device_label(setting: str) -> str:
    """What a profile is a profile of: the name of the accelerator, or of the processor and its number of cores."""
    # torch costs seconds to import and a fully cached run does not need it: no driver, no CUDA device
    if setting == "cpu" or (setting in ("auto", BALANCED) and not Path("/proc/driver/nvidia").exists()):
        return f"cpu {_processor()} ({os.cpu_count()} cores)"
    import torch

    name = device_names(setting)[0]
    return str(torch.cuda.get_device_name(name)) if name.startswith("cuda") else f"{name} {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
