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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from infra.disk import check_free, check_writable, digest, full_disk_named, make_folder, sync_folder, write_durably
from infra.errors import ArtifactMissing
from infra.locks import flocked

Kind = Literal["checkpoint", "calibration", "statistics", "report"]

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)

# Prefect decodes a cached reference about twice per hit: a broken folder is worth one warning, not one per look.
_warned: set[Path] = set()


class ArtifactRef(BaseModel):
    """The only handle that tasks pass on. It has no path in it: the store knows the root."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    key: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=200)


class FileEntry(BaseModel):
    """Size in bytes and sha256 (hex) of one file of an artifact."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, what it was made from and which files it has (by path relative to its folder)."""

    # Unknown fields are ignored: an older slimline must not throw away what a newer one took hours to make.
    model_config = ConfigDict(frozen=True)
    ref: ArtifactRef
    created_at: AwareDatetime
    seconds: float
    files: dict[str, FileEntry]
    request: dict[str, JsonValue]
    versions: dict[str, str]


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
        problem = _first_difference(self._folder(ref), manifest, ref)
        if problem:
            raise self._broken(ref, problem)
        return manifest

    @contextmanager
    def writing(
        self,
        ref: ArtifactRef,
        *,
        request: Mapping[str, JsonValue],
        versions: Mapping[str, str],
        replace: bool = False,
    ) -> Iterator[Path]:
        """Yield an empty folder to write into; it becomes the artifact when the block ends, and vanishes if it raises.

        An artifact that is already there and complete wins over ours unless `replace`; a broken one never does. The old
        one stays readable until ours is complete. `request` and `versions` go into the manifest. Raises DiskFull.
        """
        started = time.monotonic()
        with full_disk_named(self.root), self._workspace(ref) as workspace:
            folder = workspace / "new"
            folder.mkdir()
            yield folder
            manifest = Manifest(
                ref=ref,
                created_at=datetime.now(UTC),
                seconds=round(time.monotonic() - started, 3),
                files=_seal(folder),
                request=dict(request),
                versions=dict(versions),
            )
            write_durably(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
            self._commit(ref, workspace, replace)

    @contextmanager
    def lock(self, ref: ArtifactRef) -> Iterator[None]:
        """Hold the key of `ref` against other processes and threads; freed by the kernel when the holder dies."""
        with flocked(make_folder(self.root / ".locks") / f"{ref.key}.lock"):
            yield

    def scratch(self, ref: ArtifactRef) -> Path:
        """Working folder of a resumable stage: it outlives a killed process. The stage drops it when it is done."""
        return make_folder(self.root / ".scratch" / ref.key)

    def drop_scratch(self, ref: ArtifactRef) -> None:
        """Delete the working folder of `ref`, if there is one."""
        shutil.rmtree(self.root / ".scratch" / ref.key, ignore_errors=True)

    def verify(self, ref: ArtifactRef) -> list[str]:
        """Read every byte; a sentence per file that is missing, changed or foreign. Raises ArtifactMissing."""
        manifest = self._read_manifest(ref)
        present = {name: path for name, path in _files(self._folder(ref)) if name != MANIFEST}
        problems = [f"{name} is not in the manifest" for name in present if name not in manifest.files]
        for name, entry in manifest.files.items():
            if name not in present:
                problems.append(f"{name} is missing")
            elif digest(present[name]) != entry.sha256:
                problems.append(f"{name} has changed since it was written")
        return problems

    def preflight(self, min_free_bytes: int = 0) -> None:
        """Raise StoreUnwritable or DiskFull now rather than after hours; remove what killed processes left behind."""
        check_writable(self.root)
        self._sweep()
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
    def _workspace(self, ref: ArtifactRef) -> Iterator[Path]:
        """A folder of our own on the store's disk, locked while we live, so that others know when we died."""
        self._sweep()
        workspace = make_folder(self.root / ".writing") / f"{ref.key}.{secrets.token_hex(6)}"
        lock = workspace.with_name(f"{workspace.name}.lock")
        with flocked(lock):
            try:
                workspace.mkdir()
                yield workspace
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _sweep(self) -> None:
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


def _seal(folder: Path) -> dict[str, FileEntry]:
    """Hash every file and force it to the disk."""
    entries = {}
    for name, path in _files(folder):
        assert name != MANIFEST, f"{MANIFEST} is the store's own file"
        assert not path.is_symlink(), f"{name} is a link: an artifact must own its bytes"
        entries[name] = FileEntry(bytes=path.stat().st_size, sha256=digest(path, sync=True))
    assert entries, "an artifact without files"
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)
    return entries


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(path relative to `folder`, path) of every file inside, sorted."""
    found = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted((path.relative_to(folder).as_posix(), path) for path in found)


def _first_difference(folder: Path, manifest: Manifest, ref: ArtifactRef) -> str:
    if manifest.ref != ref:
        return f"its manifest belongs to {manifest.ref.kind} {manifest.ref.key}"
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} has {size} bytes instead of {entry.bytes}"
    return ""
