"""How stages use the object store behind the artifact store, if there is one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.settings import Settings

if TYPE_CHECKING:
    from infra.remote.store import RemoteStore


@dataclass(frozen=True)
class Sharing:
    """The object store, or none, in which case nothing is found there and nothing is done."""

    remote: RemoteStore | None

    def check(self) -> None:
        """Raise RemoteUnusable before any work rather than warn after it."""
        if self.remote is not None:
            self.remote.check()

    def fetch(self, ref: ArtifactRef, store: ArtifactStore) -> bool:
        """Bring the artifact into the store; whether it was there."""
        return self.remote is not None and self.remote.fetch(ref, store)

    def share(self, ref: ArtifactRef, store: ArtifactStore, *, replace: bool = False) -> None:
        """Copy the artifact from the store, unless it is there (or always, to `replace` it)."""
        if self.remote is not None:
            self.remote.share(ref, store, replace=replace)

    def lock(self, ref: ArtifactRef) -> AbstractContextManager[None]:
        """Hold the key against other machines."""
        return nullcontext() if self.remote is None else self.remote.lock(ref)


def sharing_of(settings: Settings) -> Sharing:
    """As SLIMLINE_REMOTE says. Raises SettingsInvalid for a URL that cannot be used."""
    if settings.remote is None:
        return Sharing(None)
    from infra.remote.store import remote_store

    return Sharing(remote_store(settings.remote))
