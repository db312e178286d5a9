"""Which device a stage computes on: one stage per accelerator at a time, first come, first served."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tasks.devices.leases import Lease, host_lease, lease_named, server_lease
from tasks.devices.model_cache import evict
from tasks.devices.placement import BALANCED, Placement, accelerator_name, device_names

#: seconds between two tries of devices that other processes use
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5

log = logging.getLogger("slimline")


@dataclass(eq=False)
class DeviceRequest:
    """A stage that waits. needs: key of the checkpoint that it loads, which may be there already; None: it wants an
    empty device. every: all places instead of one. grant: what it got, with the leases of its accelerators."""

    needs: str | None
    every: bool = False
    grant: tuple[tuple[Placement, ...], ExitStack] | None = None


class DevicePool:
    """Hands out places in the order of the requests. Shared by the threads of one process.

    An accelerator is leased from the other processes of the host as long as something of ours is on it. A model stays
    on its place, with the lease, if the next request needs the same one; else it is evicted before the lease ends. On
    the CPU, which nobody leases, it stays until another one comes.
    """

    def __init__(
        self,
        places: tuple[Placement, ...],
        lease: Lease = host_lease,
        evict_from: Callable[[Placement], None] = evict,
    ) -> None:
        self._places, self._lease, self._evict = places, lease, evict_from
        self._free = list(places)
        self._queue: list[DeviceRequest] = []
        self._changed = threading.Condition()

    @contextmanager
    def one(self, needs: str | None = None) -> Iterator[Placement]:
        """A place of one's own for the length of the block: one that nobody uses, here or on the host.

        needs: key of the checkpoint that will be loaded there and may stay; without it the place is empty.
        """
        with self._granted(DeviceRequest(needs)) as places:
            yield places[0]

    @contextmanager
    def all(self, needs: str | None = None) -> Iterator[Placement]:
        """Every place at once (a Trainer uses all visible GPUs); the first one is named.

        needs: key of the checkpoint that may be on the first one, with copies of it on the others.
        """
        with self._granted(DeviceRequest(needs, every=True)) as places:
            yield places[0]

    def evict_idle(self) -> None:
        """Evict what stays on places that nobody uses."""
        with self._changed:
            for place in self._free:
                self._evict(place)

    @contextmanager
    def _granted(self, request: DeviceRequest) -> Iterator[tuple[Placement, ...]]:
        places = self._wait(request)
        try:
            if request.needs is None:
                for place in places:
                    self._evict(place)
            yield places
        finally:
            self._give_back(request)

    def _wait(self, request: DeviceRequest) -> tuple[Placement, ...]:
        """Its places, leased. To be followed by `_give_back`."""
        pause, said, fresh = _FIRST_PAUSE, False, False
        with self._changed:
            self._queue.append(request)
            try:
                while request.grant is None:
                    first = self._queue[0] is request
                    if first and (grant := self._take(request)):
                        self._grant(request, grant)
                        fresh = True
                        break
                    elsewhere = first and bool(self._free) and not request.every
                    if elsewhere and not said:
                        names = ", ".join(str(place.device) for place in self._free)
                        log.info("waiting for a device: other processes of this host use %s", names)
                        said = True
                    # a place that is given back here wakes us up; for one of another process we must ask
                    self._changed.wait(pause if elsewhere else None)
                    pause = min(2 * pause, _LONGEST_PAUSE)
            except BaseException:
                self._withdraw(request)
                raise
        assert request.grant is not None
        places, leases = request.grant
        if request.every and fresh:
            try:
                # all processes take them in the same order, so that no two wait for each other
                for name in sorted(name for place in places for name in place.accelerators):
                    leases.enter_context(self._lease(name, True))
            except BaseException:
                self._release(places, leases)  # to nobody in particular: not all of them are ours
                raise
        return places

    def _take(self, request: DeviceRequest) -> tuple[tuple[Placement, ...], ExitStack] | None:
        """Free places for the first request, or None as long as there are none. Within the lock."""
        if request.every:
            if len(self._free) < len(self._places):
                return None
            self._free.clear()
            return self._places, ExitStack()
        for place in self._free:
            with ExitStack() as leases:
                if all(leases.enter_context(self._lease(name, False)) for name in sorted(place.accelerators)):
                    self._free.remove(place)
                    return (place,), leases.pop_all()
        return None

    def _grant(self, request: DeviceRequest, grant: tuple[tuple[Placement, ...], ExitStack]) -> None:
        self._queue.remove(request)
        request.grant = grant
        self._changed.notify_all()

    def _give_back(self, request: DeviceRequest) -> None:
        """Hand the places and their leases on to who is next, if it needs the same; else evict, and end the leases."""
        assert request.grant is not None
        places, leases = request.grant
        with self._changed:
            following = self._queue[0] if self._queue else None
            # a slot of the server belongs to the thread that took it: Prefect ends that thread if the slot is lost
            stays = request.needs is not None and self._lease is not server_lease
            if following and stays and (following.needs, following.every) == (request.needs, request.every):
                self._grant(following, request.grant)
                return
        self._release(places, leases)

    def _release(self, places: tuple[Placement, ...], leases: ExitStack) -> None:
        try:
            with leases:
                for place in places:
                    if place.accelerators:
                        self._evict(place)
        finally:
            with self._changed:
                self._free += places
                self._changed.notify_all()

    def _withdraw(self, request: DeviceRequest) -> None:
        """An error, such as Ctrl-C, ended the wait; perhaps places were handed over in the same moment."""
        if request.grant is not None:
            self._give_back(request)
            return
        self._queue.remove(request)
        self._changed.notify_all()


_pools: dict[tuple[str, str], DevicePool] = {}
_pools_lock = threading.Lock()


def pool(setting: str, lease: str = "host") -> DevicePool:
    """The pool of this process for a `device` and a `device_lease` setting."""
    with _pools_lock:
        if (setting, lease) not in _pools:
            _pools[setting, lease] = DevicePool(_places(setting), lease_named(lease))
        return _pools[setting, lease]


def evict_idle_models() -> None:
    """Evict the models that stay on devices of this process that no stage uses now."""
    with _pools_lock:
        pools = list(_pools.values())
    for each in pools:
        each.evict_idle()


def _places(setting: str) -> tuple[Placement, ...]:
    import torch

    names = device_names(setting)
    accelerators = tuple(name for device in names if (name := accelerator_name(device)))
    if setting == BALANCED:
        return (Placement(torch.device(names[0]), device_map="auto", accelerators=accelerators),)
    return tuple(
        Placement(torch.device(name), accelerators=tuple(filter(None, [accelerator_name(name)]))) for name in names
    )
