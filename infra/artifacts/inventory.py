"""What is in the store, and what of it is not as it should be: artifacts, unfinished work, foreign files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from infra.artifacts.manifest import files_below, first_difference
from infra.artifacts.store import MANIFEST, ArtifactRef, ArtifactStore, Kind, Manifest
from infra.errors import ArtifactMissing
from infra.filesystem.locks import flocked

KINDS: tuple[Kind, ...] = get_args(Kind)
_OWN_FOLDERS = {*KINDS, ".writing", ".locks", ".scratch", ".claims"}


@dataclass(frozen=True)
class Stored:
    """One artifact folder. manifest: None if it cannot be read."""

    ref: ArtifactRef
    folder: Path
    manifest: Manifest | None

    @cached_property
    def bytes(self) -> int:
        """Its size: from the manifest, or counted if there is none."""
        if self.manifest is None:
            return folder_bytes(self.folder)
        return sum(entry.bytes for entry in self.manifest.files.values())

    @cached_property
    def changed_at(self) -> datetime:
        """When it was made, or came here from elsewhere, whatever is later."""
        here = modified_at(self.folder)
        return here if self.manifest is None else max(here, self.manifest.created_at)

    @property
    def problem(self) -> str:
        """What makes it count as absent, judged without reading its files; "" if nothing."""
        if self.manifest is None:
            return "its manifest cannot be read"
        return first_difference(self.folder, self.manifest, self.ref)


@dataclass(frozen=True)
class Finding:
    """Something wrong. ref: the broken artifact, None for what is only litter. foreign: files in it that it does not
    know, if nothing else is wrong with it."""

    path: Path
    problem: str
    ref: ArtifactRef | None = None
    foreign: tuple[Path, ...] = ()


def stored(store: ArtifactStore) -> Iterator[Stored]:
    """Every artifact folder, by kind and key; one that goes meanwhile is left out."""
    for kind in KINDS:
        for folder in _entries(store.root / kind):
            ref = _ref(kind, folder.name)
            if ref is not None and folder.is_dir():
                yield Stored(ref, folder, _manifest(folder))


def store_bytes(store: ArtifactStore) -> int:
    """Size of the store: artifacts as their manifests say (nobody walks through them), and unfinished work."""
    unfinished = folder_bytes(store.root / ".writing", store.root / ".scratch")
    return unfinished + sum(artifact.bytes for artifact in stored(store))


def folder_bytes(*folders: Path) -> int:
    """Bytes of all files below, each inode once (finished layers are linked); files that go meanwhile are left out."""
    sizes: dict[tuple[int, int], int] = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    state = os.lstat(os.path.join(parent, name))
                except FileNotFoundError:
                    continue
                sizes[state.st_dev, state.st_ino] = state.st_size
    return sum(sizes.values())


def modified_at(path: Path) -> datetime:
    """When the folder or a file directly in it last changed; the beginning of time if it has gone."""
    times = [0.0]
    for each in (path, *_entries(path)):
        try:
            times.append(each.lstat().st_mtime)
        except FileNotFoundError:
            continue
    return datetime.fromtimestamp(max(times), UTC)


def broken(
    store: ArtifactStore, refs: Iterable[ArtifactRef], hashed: Callable[[int], None] = lambda size: None
) -> Iterator[Finding]:
    """Read every byte of the artifacts; one finding for each that is not as it was written.

    hashed: told the size of every file that was read.
    """
    for ref in refs:
        folder = store.root / ref.kind / ref.key
        for _ in range(2):  # one that is replaced while it is read looks broken
            before = _manifest(folder)
            problems, foreign = _read_through(store, ref, hashed)
            if not problems or _manifest(folder) == before:
                break
        if problems and folder.exists():
            only_foreign = len(problems) == len(foreign)
            yield Finding(folder, "; ".join(problems), ref, tuple(foreign) if only_foreign else ())


def litter(store: ArtifactStore) -> Iterator[Finding]:
    """What belongs to no artifact: foreign files and folders, what dead processes left, scratch of what is done."""
    for path in _entries(store.root):
        if path.name not in _OWN_FOLDERS:
            yield Finding(path, "is not part of a store; move it away")
    for kind in KINDS:
        for path in _entries(store.root / kind):
            if _ref(kind, path.name) is None or not path.is_dir():
                yield Finding(path, "is no artifact; move it away")
    for workspace in dead_workspaces(store):
        yield Finding(workspace, "was being written by a process that died; `slimline gc --delete` removes it")
    done = {artifact.ref.key for artifact in stored(store) if not artifact.problem}
    for folder in scratch_folders(store):
        if folder.name in done:
            yield Finding(folder, "is scratch of a stage that is done; `slimline gc --delete` removes it")


def dead_workspaces(store: ArtifactStore) -> Iterator[Path]:
    """Folders of unfinished artifacts whose writers are dead."""
    for lock in sorted((store.root / ".writing").glob("*.lock")):
        with flocked(lock, wait=False) as dead:
            workspace = lock.with_suffix("")
            if dead and not workspace.exists():
                lock.unlink(missing_ok=True)  # ended just now: our opening the file made it again
            elif dead:
                yield workspace


def scratch_folders(store: ArtifactStore) -> list[Path]:
    """Working folders of resumable stages, by key."""
    return [path for path in _entries(store.root / ".scratch") if path.is_dir()]


def _read_through(
    store: ArtifactStore, ref: ArtifactRef, hashed: Callable[[int], None]
) -> tuple[list[str], list[Path]]:
    folder = store.root / ref.kind / ref.key
    try:
        problems = store.verify(ref, hashed)
    except ArtifactMissing:
        return (["its manifest cannot be read"], []) if folder.exists() else ([], [])
    manifest = _manifest(folder)
    known = {MANIFEST, *(manifest.files if manifest else ())}
    return problems, [path for name, path in files_below(folder) if name not in known]


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _ref(kind: Kind, key: str) -> ArtifactRef | None:
    try:
        return ArtifactRef(kind=kind, key=key)
    except ValidationError:
        return None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
