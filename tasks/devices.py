"""Which device a stage computes on: one stage per accelerator at a time, stages on different ones side by side."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import SettingsInvalid
from tasks.leasing import Lease, host_lease, lease_named
from tasks.loaded import forget
from tasks.turns import LetGo, Line, Waiting

if TYPE_CHECKING:
    import torch

BALANCED = "balanced"


@dataclass(frozen=True)
class Placement:
    """Where a stage puts its model: on one device, or (device_map) spread over all of them.

    device: where computation happens, for a spread model the first device. accelerators: what the host calls the
    devices it computes on; none for the CPU.
    """

    device: torch.device
    device_map: str | None = None
    accelerators: tuple[str, ...] = ()

    @property
    def load(self) -> dict[str, Any]:
        """Keyword arguments for load_checkpoint."""
        return {"device_map": self.device_map} if self.device_map else {"device": self.device}


class DevicePool(Line):
    """Hands out places; who asks while all are taken waits. Shared by the threads of one run.

    An accelerator is also leased from the other processes of the host: several runs never compute on the same one.
    let_go: frees what stays loaded on a place (see tasks.loaded).
    """

    def __init__(self, places: tuple[Placement, ...], lease: Lease = host_lease, let_go: LetGo = forget) -> None:
        super().__init__(places, lease, let_go)
        # Two that wait for all places would each hold some: who has the turn takes them, and may hand them on with it.
        self._turns = Line((Placement(places[0].device),), lease, let_go)
        self._has_all = False

    @contextmanager
    def one(self, needs: str | None = None) -> Iterator[Placement]:
        """A place of one's own for the length of the block: one that nobody uses, here or on the host.

        needs: key of the checkpoint that will be loaded there and may stay; without it the place is empty.
        """
        with self._held(Waiting(needs)) as place:
            yield place

    @contextmanager
    def all(self, needs: str | None = None) -> Iterator[Placement]:
        """Every place at once (a Trainer uses all visible GPUs), empty ones; the first one is named.

        needs: key of the checkpoint that may be on the first one, with copies of it on the others.
        """
        turn, taken = self._turns.take(Waiting(needs))
        try:
            if not self._has_all:
                taken.enter_context(self._everything(needs))
            yield self._places[0]
        finally:
            self._turns.give_back(turn, taken)

    @contextmanager
    def _everything(self, needs: str | None) -> Iterator[None]:
        """All places, which all processes take in the same order; each is emptied before the first is given back."""
        with ExitStack() as held:
            for place in sorted(self._places, key=lambda place: place.accelerators):
                held.enter_context(self._held(Waiting(needs if place == self._places[0] else None, only=place)))
            self._has_all = True
            try:
                yield
            finally:
                self._has_all = False
                for place in self._places:
                    if place.accelerators:
                        self._let_go(place)

    @contextmanager
    def _held(self, waiting: Waiting) -> Iterator[Placement]:
        place, leases = self.take(waiting)
        try:
            if waiting.only is not None:
                for name in sorted(place.accelerators):
                    leases.enter_context(self._lease(name, True))
            if waiting.needs is None:
                self._let_go(place)
            yield place
        finally:
            self.give_back(place, leases)


_pools: dict[tuple[str, str], DevicePool] = {}
_making = threading.Lock()


def pool(setting: str, lease: str = "host") -> DevicePool:
    """The pool of this process for a `device` and a `device_lease` setting."""
    with _making:
        if (setting, lease) not in _pools:
            _pools[setting, lease] = DevicePool(_places(setting), lease_named(lease))
        return _pools[setting, lease]


def empty_idle_places() -> None:
    """Let go of the models that stay on devices of this process that no stage uses now."""
    with _making:
        pools = list(_pools.values())
    for each in pools:
        each.empty()


def _places(setting: str) -> tuple[Placement, ...]:
    import torch

    names = device_names(setting)
    accelerators = tuple(name for device in names if (name := accelerator_name(device)))
    if setting == BALANCED:
        return (Placement(torch.device(names[0]), device_map="auto", accelerators=accelerators),)
    return tuple(Placement(torch.device(name), accelerators=_alone(accelerator_name(name))) for name in names)


def accelerator_name(device: str) -> str | None:
    """What a device is called on its host, whatever CUDA_VISIBLE_DEVICES makes of it; None for the CPU, which several
    processes may use at once."""
    import torch

    if device.startswith("cuda"):
        return f"cuda-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
    return None if torch.device(device).type in ("cpu", "meta") else device


def _alone(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


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

    names = device_names(setting)
    if not names[0].startswith("cuda"):
        return f"{names[0]} {_processor()}"
    name = str(torch.cuda.get_device_name(names[0]))
    return f"{len(names)} x {name} (balanced)" if setting == BALANCED and len(names) > 1 else name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
