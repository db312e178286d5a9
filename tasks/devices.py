"""Which device a stage computes on: one stage per accelerator at a time, stages on different ones side by side."""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import SettingsInvalid
from tasks.leasing import Lease, host_lease, lease_named

if TYPE_CHECKING:
    import torch

BALANCED = "balanced"

#: seconds between two looks at devices that other processes use
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: how many later ones may be served before who waits, because the device has their model loaded
_PATIENCE = 8

log = logging.getLogger("slimline")


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


@dataclass(eq=False)
class _Waiting:
    """Who waits for a place: the model that it needs there, and how many later ones were served before it."""

    needs: str | None
    passed_over: int = 0


class DevicePool:
    """Hands out places; who asks while all are taken waits. Shared by the threads of one run.

    First come, first served, but who needs the model that was used last on a place comes before who needs another one.
    An accelerator is also leased from the other processes of the host: several runs never compute on the same one.
    """

    def __init__(self, places: tuple[Placement, ...], lease: Lease = host_lease) -> None:
        self._places = places
        self._lease = lease
        self._free = list(places)
        self._loaded: dict[Placement, str] = {}
        self._queue: list[_Waiting] = []
        self._changed = threading.Condition()
        self._taking_all = threading.Lock()

    @contextmanager
    def one(self, needs: str | None = None) -> Iterator[Placement]:
        """A place of one's own for the length of the block: one that nobody uses, here or on the host.

        needs: key of the checkpoint that will be loaded there and stay (see tasks.loaded), if it may.
        """
        place, leases = self._take_any(needs)
        with self._given_back(place, leases):
            yield place

    @contextmanager
    def all(self) -> Iterator[Placement]:
        """Every place at once (a Trainer uses all visible GPUs); the first one is named."""
        # Two that wait for all would each hold some: here one after the other, between processes in the same order.
        with ExitStack() as taken:
            with self._taking_all:
                for place in sorted(self._places, key=lambda place: place.accelerators):
                    taken.enter_context(self._this(place))
            yield self._places[0]

    @contextmanager
    def _this(self, place: Placement) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: place in self._free)
            self._took(place, None)
        leases = ExitStack()
        with self._given_back(place, leases):
            for name in sorted(place.accelerators):
                leases.enter_context(self._lease(name, True))
            yield

    def _take_any(self, needs: str | None = None) -> tuple[Placement, ExitStack]:
        pause, told, me = _FIRST_PAUSE, False, _Waiting(needs)
        with self._changed, self._queued(me):
            while True:
                for place in sorted(self._free, key=lambda place: self._unfit(place, needs)):
                    leases = self._try(place) if self._next_on(place) is me else None
                    if leases is not None:
                        self._took(place, needs)
                        for earlier in self._queue[: self._queue.index(me)]:
                            earlier.passed_over += 1
                        return place, leases
                if self._free and not told and self._queue[0] is me:
                    log.info("waiting for a device: other processes of this host use %s", _named(self._free))
                    told = True
                # A place that is given back here wakes us up; one that another process gives back must be asked for.
                self._changed.wait(pause if self._free else None)
                pause = min(2 * pause, _LONGEST_PAUSE)

    @contextmanager
    def _queued(self, waiting: _Waiting) -> Iterator[None]:
        """In the queue for the length of the block, within the lock; the next look up when it leaves."""
        self._queue.append(waiting)
        try:
            yield
        finally:
            self._queue.remove(waiting)
            self._changed.notify_all()

    def _next_on(self, place: Placement) -> _Waiting:
        """Whose turn it is on a free place: the first that needs what is loaded there, else the first; nobody is passed
        over for ever."""
        first, loaded = self._queue[0], self._loaded.get(place)
        if loaded is None or first.passed_over >= _PATIENCE:
            return first
        return next((waiting for waiting in self._queue if waiting.needs == loaded), first)

    def _unfit(self, place: Placement, needs: str | None) -> int:
        """0 for a place where the model is loaded, 1 for one without any, 2 for one with a model for somebody else."""
        loaded = self._loaded.get(place)
        return 1 if loaded is None else 0 if loaded == needs else 2

    def _took(self, place: Placement, needs: str | None) -> None:
        self._free.remove(place)
        self._loaded.pop(place, None)
        if needs is not None:
            self._loaded[place] = needs

    def _try(self, place: Placement) -> ExitStack | None:
        """Leases of all accelerators of a place, or None as soon as one of them is not free."""
        with ExitStack() as leases:
            if all(leases.enter_context(self._lease(name, False)) for name in sorted(place.accelerators)):
                return leases.pop_all()
        return None

    @contextmanager
    def _given_back(self, place: Placement, leases: ExitStack) -> Iterator[None]:
        try:
            with leases:
                yield
        finally:
            with self._changed:
                self._free.append(place)
                self._changed.notify_all()


@cache
def pool(setting: str, lease: str = "host") -> DevicePool:
    """The pool of this process for a `device` and a `device_lease` setting."""
    import torch

    names = device_names(setting)
    accelerators = tuple(name for device in names if (name := accelerator_name(device)))
    if setting == BALANCED:
        spread = Placement(torch.device(names[0]), device_map="auto", accelerators=accelerators)
        return DevicePool((spread,), lease_named(lease))
    places = (Placement(torch.device(name), accelerators=_alone(accelerator_name(name))) for name in names)
    return DevicePool(tuple(places), lease_named(lease))


def accelerator_name(device: str) -> str | None:
    """What a device is called on its host, whatever CUDA_VISIBLE_DEVICES makes of it; None for the CPU, which several
    processes may use at once."""
    import torch

    if device.startswith("cuda"):
        return f"cuda-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
    return None if torch.device(device).type in ("cpu", "meta") else device


def _alone(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _named(places: list[Placement]) -> str:
    return ", ".join(str(place.device) for place in places)


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
