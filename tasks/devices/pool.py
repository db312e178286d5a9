"""Which device a stage computes on: one stage per accelerator at a time, stages on different ones side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tasks.devices.leases import Lease, host_lease, lease_named
from tasks.devices.model_cache import forget
from tasks.devices.placement import BALANCED, Placement, accelerator_name, device_names
from tasks.devices.turns import DeviceQueue, DeviceRequest, LetGo

if TYPE_CHECKING:
    pass


class DevicePool(DeviceQueue):
    """Hands out places; who asks while all are taken waits. Shared by the threads of one run.

    An accelerator is also leased from the other processes of the host: several runs never compute on the same one.
    let_go: frees what stays loaded on a place (see tasks.devices.model_cache).
    """

    def __init__(self, places: tuple[Placement, ...], lease: Lease = host_lease, let_go: LetGo = forget) -> None:
        super().__init__(places, lease, let_go)
        # Two that wait for all places would each hold some: who has the turn takes them, and may hand them on with it.
        self._turns = DeviceQueue((Placement(places[0].device),), lease, let_go)
        self._has_all = False

    @contextmanager
    def one(self, needs: str | None = None) -> Iterator[Placement]:
        """A place of one's own for the length of the block: one that nobody uses, here or on the host.

        needs: key of the checkpoint that will be loaded there and may stay; without it the place is empty.
        """
        with self._held(DeviceRequest(needs)) as place:
            yield place

    @contextmanager
    def all(self, needs: str | None = None) -> Iterator[Placement]:
        """Every place at once (a Trainer uses all visible GPUs), empty ones; the first one is named.

        needs: key of the checkpoint that may be on the first one, with copies of it on the others.
        """
        turn, taken = self._turns.take(DeviceRequest(needs))
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
                held.enter_context(self._held(DeviceRequest(needs if place == self._places[0] else None, only=place)))
            self._has_all = True
            try:
                yield
            finally:
                self._has_all = False
                for place in self._places:
                    if place.accelerators:
                        self._let_go(place)

    @contextmanager
    def _held(self, waiting: DeviceRequest) -> Iterator[Placement]:
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
    return tuple(
        Placement(torch.device(name), accelerators=tuple(filter(None, [accelerator_name(name)]))) for name in names
    )
