"""The second level of the artifact store: an object store that several machines share.

Layout: `<url>/<kind>/<key>/<upload>/` holds the files of one upload and `<url>/<kind>/<key>/entry.json`, written last
and in one step, names the upload and has its manifest: a remote artifact is complete or absent, too. Once a run has
begun, an object store that fails costs warnings and never a stage: what is made is kept here and shared next time.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.artifacts.manifest import ArtifactRef, Manifest, is_inside
from infra.artifacts.store import ArtifactStore
from infra.errors import ArtifactMissing, InfraError
from infra.filesystem.disk import digest
from infra.remote.files import RemoteFiles, open_files
from infra.remote.locks import LOCK_TIMING, LockTiming, remotely_locked
from infra.settings import Settings

log = logging.getLogger("slimline")

_ENTRY = "entry.json"
_TIME = "%Y%m%dT%H%M%S"
#: an upload that no entry names is somebody's who is still at it, or was killed; after a day it is the latter
_UPLOAD_LASTS = timedelta(days=1)


class Entry(BaseModel):
    """Which upload is the artifact, and its manifest."""

    model_config = ConfigDict(frozen=True)
    upload: str = Field(pattern=r"^[0-9A-Za-z-]+$")
    manifest: Manifest


class _Corrupt(InfraError):
    """What lies there is not what its entry says."""


class RemoteStore:
    """Artifacts on an object store. Only `check` raises; everything else warns and counts as not there."""

    def __init__(self, files: RemoteFiles, timing: LockTiming = LOCK_TIMING) -> None:
        self._files, self._timing = files, timing

    def check(self) -> None:
        """Raise RemoteUnusable if it cannot be reached, written and locked."""
        self._files.check()

    def fetch(self, ref: ArtifactRef, store: ArtifactStore) -> bool:
        """Copy the artifact into the store, if it is here and every byte of it is right."""
        with self._forgiven(ref, "fetched"):
            entry = self._entry(ref)
            if entry is not None:
                log.info("%s is fetched from %s", ref.key, self._files.url)
                self._download(entry, store)
                return True
        return False

    def share(self, ref: ArtifactRef, store: ArtifactStore, *, replace: bool = False) -> None:
        """Copy the store's artifact here, unless it is here. Files first, and the entry last and in one step.

        replace: also if it is here, since what was just made was not here or could not be used.
        """
        with self._forgiven(ref, "shared"):
            if replace or not self._is_here(ref):
                self._upload(store.path(ref), store.manifest(ref))

    @contextmanager
    def lock(self, ref: ArtifactRef) -> Iterator[None]:
        """Hold the key of `ref` against all machines; without one, if the object store does not answer."""
        with ExitStack() as held:
            with self._forgiven(ref, "locked"):
                held.enter_context(remotely_locked(self._files, f".locks/{ref.kind}.{ref.key}", self._timing))
            yield

    def _is_here(self, ref: ArtifactRef) -> bool:
        try:
            return self._entry(ref) is not None
        except _Corrupt:
            return False

    def _entry(self, ref: ArtifactRef) -> Entry | None:
        content = self._files.read(f"{_folder(ref)}/{_ENTRY}")
        if content is None:
            return None
        try:
            entry = Entry.model_validate_json(content)
        except ValidationError as error:
            raise _Corrupt("its entry cannot be read") from error
        if entry.manifest.ref != ref or not all(map(is_inside, entry.manifest.files)):
            raise _Corrupt("its entry belongs to another artifact or names files outside")
        return entry

    def _download(self, entry: Entry, store: ArtifactStore) -> None:
        ref = entry.manifest.ref
        with store.trash() as aside:  # deleted by whoever comes next, if we are killed
            folder = aside / "fetched"
            for name, expected in entry.manifest.files.items():
                self._files.download(f"{_folder(ref)}/{entry.upload}/{name}", folder / name)
                if digest(folder / name, sync=True) != expected.sha256:
                    raise _Corrupt(f"{name} is not what was uploaded")
            store.adopt(folder, entry.manifest)

    def _upload(self, folder: Path, manifest: Manifest) -> None:
        home = _folder(manifest.ref)
        upload = f"{datetime.now(UTC).strftime(_TIME)}-{secrets.token_hex(4)}"
        for name in manifest.files:
            self._files.upload(folder / name, f"{home}/{upload}/{name}")
        entry = Entry(upload=upload, manifest=manifest)
        self._files.write(f"{home}/{_ENTRY}", entry.model_dump_json(indent=1).encode())
        self._remove_old(home, upload)

    def _remove_old(self, home: str, current: str) -> None:
        before = (datetime.now(UTC) - _UPLOAD_LASTS).strftime(_TIME)
        for name in self._files.names(home):
            if name not in (_ENTRY, current) and name.partition("-")[0] < before:
                self._files.remove(f"{home}/{name}")

    @contextmanager
    def _forgiven(self, ref: ArtifactRef, what: str) -> Iterator[None]:
        try:
            yield
        except ArtifactMissing:
            raise
        except Exception as error:  # every driver has its own
            reason = str(error) if isinstance(error, InfraError) else str(error) or type(error).__name__
            log.warning("%s could not be %s at %s: %s", ref.key, what, self._files.url, reason)


class _NoRemoteStore:
    """Where SLIMLINE_REMOTE is not set: nothing is found there and nothing is done."""

    def check(self) -> None: ...

    def fetch(self, ref: ArtifactRef, store: ArtifactStore) -> bool:
        return False

    def share(self, ref: ArtifactRef, store: ArtifactStore, *, replace: bool = False) -> None: ...

    def lock(self, ref: ArtifactRef) -> AbstractContextManager[None]:
        return nullcontext()


def remote_store(settings: Settings) -> RemoteStore | _NoRemoteStore:
    """The object store that SLIMLINE_REMOTE names. Raises SettingsInvalid for a URL that cannot be used."""
    return _NoRemoteStore() if settings.remote is None else _opened(settings.remote)


@cache
def _opened(url: str) -> RemoteStore:
    return RemoteStore(open_files(url))


def _folder(ref: ArtifactRef) -> str:
    return f"{ref.kind}/{ref.key}"
