"""Who gets a place to compute next: the threads of one process that wait for devices, in the order of their turns."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.devices.leases import Lease, server_lease

if TYPE_CHECKING:
    from tasks.devices.placement import Placement

LetGo = Callable[["Placement"], None]
"""Called with a place; frees what stays loaded there."""

#: seconds between two looks at devices that other processes use
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: how many later ones may be served before who waits, because the device has their model loaded
PATIENCE = 8

log = logging.getLogger("slimline")


@dataclass(eq=False)
class DeviceRequest:
    """Who waits: for the model that it needs on a place, for the one place that it would take if it is not any, how
    many later ones were served before it, and in the end what it was given."""

    needs: str | None
    only: Placement | None = None
    passed_over: int = 0
    given: tuple[Placement, ExitStack] | None = None


class DeviceQueue:
    """The threads of this process that wait for places, and who is next.

    First come, first served, but who needs the model that was used last on a place comes before who needs another one,
    and gets the place with its leases: no other process comes between the two. A model whose place is leased goes
    before the lease does, unless it is handed on so.
    """

    def __init__(self, places: tuple[Placement, ...], lease: Lease, let_go: LetGo) -> None:
        self._places = places
        self._lease = lease
        self._let_go = let_go
        self._free = list(places)
        self._loaded: dict[Placement, str] = {}
        self._queue: list[DeviceRequest] = []
        self._changed = threading.Condition()

    def take(self, me: DeviceRequest) -> tuple[Placement, ExitStack]:
        """Wait for a place; with it come the leases of its accelerators, or none yet where it is the only one wanted.

        To be followed by give_back.
        """
        pause, told = _FIRST_PAUSE, False
        with self._changed:
            self._queue.append(me)
            try:
                while not (me.given or self._served(me)):
                    if self._free and not told and me.only is None and self._queue[0] is me:
                        log.info("waiting for a device: other processes of this host use %s", _named(self._free))
                        told = True
                    # A place that is given back here wakes us up; for one of another process we must ask.
                    self._changed.wait(pause if self._free else None)
                    pause = min(2 * pause, _LONGEST_PAUSE)
            except BaseException:
                self._withdraw(me)
                raise
        assert me.given is not None
        return me.given

    def give_back(self, place: Placement, leases: ExitStack) -> None:
        """Hand the place on to who needs what is loaded there, or let that and the leases go, in this order."""
        with self._changed:
            if heir := self._heir(place):
                self._give(place, leases, heir)
                return
        try:
            with leases:
                if place.accelerators:
                    self._let_go(place)
        finally:
            with self._changed:
                if place.accelerators:
                    self._loaded.pop(place, None)
                self._free.append(place)
                self._changed.notify_all()

    def empty(self) -> None:
        """Let go of what stays on places that nobody uses."""
        with self._changed:
            for place in [place for place in self._free if self._loaded.pop(place, None)]:
                self._let_go(place)

    def _served(self, me: DeviceRequest) -> bool:
        """Whether a place was free that is not for somebody else; then `me` has it. Within the lock, as all below."""
        for place in sorted(self._free, key=lambda place: self._unfit(place, me.needs)):
            if self._next_on(place) is me:
                leases = self._try(place) if me.only is None else ExitStack()
                if leases is not None:
                    self._free.remove(place)
                    self._give(place, leases, me)
                    return True
        return False

    def _give(self, place: Placement, leases: ExitStack, to: DeviceRequest) -> None:
        for earlier in self._queue[: self._queue.index(to)]:
            earlier.passed_over += 1
        self._queue.remove(to)
        self._loaded.pop(place, None)
        if to.needs is not None:
            self._loaded[place] = to.needs
        to.given = place, leases
        self._changed.notify_all()

    def _withdraw(self, me: DeviceRequest) -> None:
        """An error, such as Ctrl-C, ended the wait; perhaps a place was handed over in the same moment."""
        if me.given is not None:
            self.give_back(*me.given)
            return
        self._queue.remove(me)
        self._changed.notify_all()

    def _next_on(self, place: Placement) -> DeviceRequest | None:
        """Whose turn it is on a place: the first that needs what is loaded there, else the first; nobody is passed over
        for ever."""
        line = [waiting for waiting in self._queue if waiting.only in (None, place)]
        loaded = self._loaded.get(place)
        if not line or loaded is None or line[0].passed_over >= PATIENCE:
            return line[0] if line else None
        return next((waiting for waiting in line if waiting.needs == loaded), line[0])

    def _heir(self, place: Placement) -> DeviceRequest | None:
        """Who gets a place that is being given back as it is: who is next, if it needs what is loaded there."""
        if self._lease is server_lease:
            return None  # a slot of the server belongs to the thread that took it: Prefect ends that if it is lost
        heir, loaded = self._next_on(place), self._loaded.get(place)
        return heir if heir and heir.only is None and loaded is not None and heir.needs == loaded else None

    def _unfit(self, place: Placement, needs: str | None) -> int:
        """0 for a place where the model is loaded, 1 for one without any, 2 for one with a model for somebody else."""
        loaded = self._loaded.get(place)
        return 1 if loaded is None else 0 if loaded == needs else 2

    def _try(self, place: Placement) -> ExitStack | None:
        """Leases of all accelerators of a place, or None as soon as one of them is not free."""
        with ExitStack() as leases:
            if all(leases.enter_context(self._lease(name, False)) for name in sorted(place.accelerators)):
                return leases.pop_all()
        return None


def _named(places: list[Placement]) -> str:
    return ", ".join(str(place.device) for place in places)
