"""Who must agree that an accelerator is free: the processes of this host, or all that report to Prefect's server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from infra.errors import SettingsInvalid
from infra.filesystem.locks import leased
from infra.settings import Settings

#: called with an accelerator's name and `wait`; yields whether it is ours. Without `wait` the answer comes at once.
Lease = Callable[[str, bool], AbstractContextManager[bool]]

#: seconds after which the slot of a holder that does not renew it is free again; living holders renew it in time
_SLOT_SECONDS = 300.0


def lease_named(mode: str) -> Lease:
    """The lease for a `device_lease` setting."""
    return {"host": host_lease, "server": server_lease}[mode]


@contextmanager
def host_lease(name: str, wait: bool) -> Iterator[bool]:
    """A lock of the kernel: free at once when its holder dies."""
    with leased(name, wait=wait) as ours:
        yield ours


@contextmanager
def server_lease(name: str, wait: bool) -> Iterator[bool]:
    """The host's lock, and the only slot of the device's concurrency limit on Prefect's server.

    For containers that share a GPU but no file system. The slot of a killed holder is free again after five minutes.
    """
    from prefect.concurrency.sync import concurrency

    limit = f"slimline-device-{name.replace(':', '-')}"
    with leased(name, wait=wait) as ours, ExitStack() as held:
        # asked first: Prefect has no attempt that does not wait
        if not ours or not (_slot_free(limit) or wait):
            yield False
            return
        slot = concurrency(limit, strict=True, timeout_seconds=None if wait else 1.0, lease_duration=_SLOT_SECONDS)
        try:
            held.enter_context(slot)
        except TimeoutError:  # somebody was quicker
            yield False
            return
        yield True


def check_lease(settings: Settings) -> None:
    """Raise SettingsInvalid if the server that should agree is one that this run starts for itself alone."""
    if settings.device_lease == "host":
        return
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise SettingsInvalid(
            "SLIMLINE_DEVICE_LEASE=server needs a Prefect server that all who share the devices report to; "
            "set PREFECT_API_URL, or SLIMLINE_DEVICE_LEASE=host"
        )


def _slot_free(limit: str) -> bool:
    """Whether a device's slot could be had now. The limit is made, with one slot, where the server has none."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(limit).active_slots == 0
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists, PrefectHTTPStatusError):  # somebody else may be making it
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit, limit=1))
        return client.read_global_concurrency_limit_by_name(limit).active_slots == 0
