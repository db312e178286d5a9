"""The artifact store: an artifact is complete or absent, whatever is killed, filled up or deleted meanwhile.

Layout: `<root>/<kind>/<key>/` holds the files and, written last, `manifest.json` with their sizes and hashes.
Unfinished work lies in `<root>/.writing`, locks in `<root>/.locks`, working folders of resumable stages in
`<root>/.scratch`.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue, ValidationError

from infra.artifacts.manifest import (
    MANIFEST,
    ArtifactRef,
    FileEntry,
    Kind,
    Manifest,
    files_below,
    first_difference,
    seal,
    sync_folders,
)
from infra.errors import ArtifactMissing
from infra.filesystem.disk import (
    check_free,
    check_writable,
    digest,
    full_disk_named,
    make_folder,
    sync_folder,
    write_durably,
)
from infra.filesystem.locks import flocked
from infra.filesystem.mounts import check_locks

__all__ = ["MANIFEST", "ArtifactRef", "ArtifactStore", "FileEntry", "Kind", "Manifest"]

log = logging.getLogger("slimline")

# Prefect decodes a cached reference about twice per hit: a broken folder is worth one warning, not one per look.
_warned: set[Path] = set()


class ArtifactStore:
    """Folders of files under `root`, each found by its `ArtifactRef`. Safe between processes of one host."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, ref: ArtifactRef) -> bool:
        """Whether the artifact is complete, judged by manifest and file sizes (no hashing).

        A broken one, and one that was deleted behind the store's back, is absent and logs one warning.
        """
        try:
            self.manifest(ref)
        except ArtifactMissing as error:
            self._warn_if_lost(ref, error)
            return False
        return True

    def path(self, ref: ArtifactRef) -> Path:
        """Folder of a complete artifact, to be read only. Raises ArtifactMissing."""
        self.manifest(ref)
        return self._folder(ref)

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Manifest of a complete artifact. Raises ArtifactMissing, which says what is wrong with it."""
        manifest = self._read_manifest(ref)
        problem = first_difference(self._folder(ref), manifest, ref)
        if problem:
            raise self._broken(ref, problem)
        return manifest

    @contextmanager
    def writing(
        self, ref: ArtifactRef, *, request: Mapping[str, JsonValue], versions: Mapping[str, str], replace: bool = False
    ) -> Iterator[Path]:
        """Yield an empty folder to write into; it becomes the artifact when the block ends, and vanishes if it raises.

        An artifact that is already there and complete wins over ours unless `replace`; a broken one never does. The old
        one stays readable until ours is complete. `request` and `versions` go into the manifest. Raises DiskFull.
        """
        started = time.monotonic()
        with full_disk_named(self.root), self._workspace(ref.key) as workspace:
            folder = workspace / "new"
            folder.mkdir()
            yield folder
            manifest = Manifest(
                ref=ref,
                created_at=datetime.now(UTC),
                seconds=round(time.monotonic() - started, 3),
                files=seal(folder),
                request=dict(request),
                versions=dict(versions),
            )
            write_durably(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
            self._commit(ref, workspace, replace)

    def adopt(self, folder: Path, manifest: Manifest) -> None:
        """Make a folder of this disk, whose files were found to be those of `manifest`, the artifact; it moves.

        One that is there already and complete is kept, and the folder vanishes. Raises DiskFull.
        """
        with full_disk_named(self.root), self._workspace(manifest.ref.key) as workspace:
            write_durably(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
            sync_folders(folder)
            folder.rename(workspace / "new")
            self._commit(manifest.ref, workspace, replace=False)

    @contextmanager
    def trash(self) -> Iterator[Path]:
        """A folder to `discard` into; what is in it is deleted when the block ends, or by whoever comes next."""
        with self._workspace("trash") as workspace:
            yield workspace

    def discard(self, ref: ArtifactRef, trash: Path) -> bool:
        """Move an artifact, whole or broken, out of the store in one step, and forget that there was one.

        False, and nothing is done, if somebody is at work on its key.
        """
        folder = self._folder(ref)
        with self.lock(ref, wait=False) as ours:
            if not ours:
                return False
            with flocked(record := self._commit_record(ref)):
                # first the record: a kill in between must not look as if the folder was deleted behind our back
                write_durably(record, b"")
                if folder.exists():
                    folder.rename(trash / f"{ref.kind}.{ref.key}")
                    sync_folder(folder.parent)
                record.unlink()
            self._lock_file(ref).unlink()
        _warned.discard(folder)
        return True

    @contextmanager
    def lock(self, ref: ArtifactRef, *, wait: bool = True) -> Iterator[bool]:
        """Hold the key of `ref` against other processes and threads; freed by the kernel when the holder dies.

        Yields True; with `wait=False` False at once if somebody else holds it.
        """
        with flocked(self._lock_file(ref), wait=wait) as ours:
            yield ours

    def scratch(self, ref: ArtifactRef) -> Path:
        """Working folder of a resumable stage: it outlives a killed process. The stage drops it when it is done."""
        return make_folder(self.root / ".scratch" / ref.key)

    def drop_scratch(self, ref: ArtifactRef) -> None:
        """Delete the working folder of `ref`, if there is one."""
        shutil.rmtree(self.root / ".scratch" / ref.key, ignore_errors=True)

    def verify(self, ref: ArtifactRef, hashed: Callable[[int], None] = lambda size: None) -> list[str]:
        """Read every byte; a sentence per file that is missing, changed or foreign. Raises ArtifactMissing.

        hashed: told the size of every file that was read.
        """
        manifest = self._read_manifest(ref)
        present = {name: path for name, path in files_below(self._folder(ref)) if name != MANIFEST}
        problems = [f"{name} is not in the manifest" for name in present if name not in manifest.files]
        for name, entry in manifest.files.items():
            if name not in present:
                problems.append(f"{name} is missing")
                continue
            if digest(present[name]) != entry.sha256:
                problems.append(f"{name} has changed since it was written")
            hashed(entry.bytes)
        return problems

    def preflight(self, min_free_bytes: int = 0) -> None:
        """Raise StoreUnwritable, StoreUnsafe or DiskFull now rather than after hours; remove what killed processes left
        behind."""
        check_writable(self.root)
        check_locks(self.root)
        self.sweep()
        check_free(self.root, min_free_bytes)

    def _folder(self, ref: ArtifactRef) -> Path:
        return self.root / ref.kind / ref.key

    def _read_manifest(self, ref: ArtifactRef) -> Manifest:
        folder = self._folder(ref)
        if not folder.is_dir():
            raise ArtifactMissing(f"{ref.kind} {ref.key} is not in the store {self.root}; run the stage that makes it")
        try:
            return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except (OSError, ValidationError) as error:
            raise self._broken(ref, "its manifest cannot be read") from error

    def _lock_file(self, ref: ArtifactRef) -> Path:
        return make_folder(self.root / ".locks") / f"{ref.key}.lock"

    def _commit_record(self, ref: ArtifactRef) -> Path:
        """Lock file of commits; not empty once there was one, which tells a deleted artifact from a new request."""
        return make_folder(self.root / ".locks") / f"{ref.key}.{ref.kind}.commit"

    def _broken(self, ref: ArtifactRef, problem: str) -> ArtifactMissing:
        return ArtifactMissing(f"{ref.kind} {ref.key} in {self.root} is broken: {problem}; run its stage again")

    def _warn_if_lost(self, ref: ArtifactRef, error: ArtifactMissing) -> None:
        folder = self._folder(ref)
        record = self.root / ".locks" / f"{ref.key}.{ref.kind}.commit"
        lost = folder.exists() or (record.exists() and record.stat().st_size > 0)
        if lost and folder not in _warned:
            _warned.add(folder)
            log.warning("%s (counted as not there: it will be made again)", error)

    @contextmanager
    def _workspace(self, name: str) -> Iterator[Path]:
        """A folder of our own on the store's disk, locked while we live, so that others know when we died."""
        self.sweep()
        workspace = make_folder(self.root / ".writing") / f"{name}.{secrets.token_hex(6)}"
        lock = workspace.with_name(f"{workspace.name}.lock")
        with flocked(lock):
            try:
                workspace.mkdir()
                yield workspace
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
                lock.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the workspaces of dead processes: those whose lock is free."""
        for lock in sorted((self.root / ".writing").glob("*.lock")):
            with flocked(lock, wait=False) as free:
                if free:
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink(missing_ok=True)

    def _commit(self, ref: ArtifactRef, workspace: Path, replace: bool) -> None:
        record = self._commit_record(ref)
        with flocked(record):
            if not replace and self.has(ref):
                log.info("%s %s was completed by somebody else meanwhile: theirs is kept", ref.kind, ref.key)
                return
            write_durably(record, datetime.now(UTC).isoformat().encode())
            folder = self._folder(ref)
            make_folder(folder.parent)
            _swap(workspace, folder)
            _warned.discard(folder)


def _swap(workspace: Path, folder: Path) -> None:
    """Rename `workspace/new` to `folder`; what was there moves to `workspace/old`, or back if the rename fails."""
    old = workspace / "old"
    if folder.exists():
        folder.rename(old)
    try:
        (workspace / "new").rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
