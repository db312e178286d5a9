"""Clearing the store: what no kept run needs any more, and nothing that anybody works on or counts on.

Kept are: artifacts that the caller wants, all that a live claim names, what changed within `older_than`, and what is
locked. Nothing is deleted in place: it is renamed into a folder that counts as the unfinished work of this process, so
that kill -9 leaves every artifact either whole or gone, and the rest to whoever sweeps next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.artifacts.claims import claims_frozen, live_claims
from infra.artifacts.inventory import dead_workspaces, folder_bytes, modified_at, scratch_folders, stored
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.filesystem.locks import flocked

#: locks of other things may lie beside them: only what is called like a key is ours to remove
_LOCK_OF_KEY = re.compile(r"(?P<key>[a-z0-9][a-z0-9._-]*-v\d+-[0-9a-f]{16})(\.[a-z]+)?\.(lock|commit)")


@dataclass(frozen=True)
class Garbage:
    """One thing that can go. what: the artifact's kind, "scratch", "unfinished" or "lock"; bytes: what it frees."""

    what: str
    name: str
    path: Path
    bytes: int
    changed_at: datetime
    ref: ArtifactRef | None = None


@dataclass(frozen=True)
class Clearing:
    """What a clearing came to. garbage: what can go, or went; in_use: what somebody took up at the last moment."""

    garbage: tuple[Garbage, ...]
    num_kept: int
    kept_bytes: int
    in_use: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """What removing all of it frees."""
        return sum(each.bytes for each in self.garbage)

    def as_json(self) -> dict[str, Any]:
        """For `slimline gc --json`, the largest first."""
        garbage = [
            {"what": each.what, "name": each.name, "bytes": each.bytes, "changed_at": each.changed_at.isoformat()}
            for each in by_size(self.garbage)
        ]
        kept = {"kept": self.num_kept, "kept_bytes": self.kept_bytes}
        return {"garbage": garbage, "bytes": self.bytes, "in_use": list(self.in_use)} | kept


def by_size(garbage: Iterable[Garbage]) -> list[Garbage]:
    """The largest first, those of one size by name."""
    return sorted(garbage, key=lambda each: (-each.bytes, each.name))


def survey(store: ArtifactStore, wanted: Callable[[], Collection[ArtifactRef]], older_than: timedelta) -> Clearing:
    """What `clear` would remove now; nothing is changed but the files of dead claims."""
    with claims_frozen(store.root):
        return _survey(store, wanted, older_than)


def clear(
    store: ArtifactStore,
    wanted: Callable[[], Collection[ArtifactRef]],
    older_than: timedelta,
    *,
    records: Path | None = None,
) -> Clearing:
    """Remove what neither a kept run, nor a live claim, nor a lock holds, and that is older than `older_than`.

    wanted: the artifacts of kept runs, asked once no run can begin or end unnoticed. records: folder with a file by key
    for each artifact that somebody believes to be there (Prefect's cache); those of removed ones go too.
    Raises StoreInUse, StoreUnwritable.
    """
    emptied_later = ExitStack()  # renaming takes no time, deleting gigabytes does: runs need not wait for that
    with emptied_later, claims_frozen(store.root):
        found = _survey(store, wanted, older_than)
        trash = emptied_later.enter_context(store.trash())
        left = [each for each in found.garbage if not _remove(store, each, trash)]
    gone = tuple(each for each in found.garbage if each not in left)
    for each in gone:
        if records is not None and each.ref is not None:
            (records / each.ref.key).unlink(missing_ok=True)
    return Clearing(gone, found.num_kept, found.kept_bytes, tuple(each.name for each in left))


def _survey(store: ArtifactStore, wanted: Callable[[], Collection[ArtifactRef]], older_than: timedelta) -> Clearing:
    # claims first: a run that gives up its claim in between has been recorded, and is found among the wanted
    claimed = {ref for claim in live_claims(store.root) for ref in claim.refs}
    kept = claimed | set(wanted())
    until = datetime.now(UTC) - older_than
    garbage, num_kept, kept_bytes, complete = [], 0, 0, set()
    for artifact in stored(store):
        if artifact.ref in kept or artifact.changed_at > until or _locked(store, artifact.ref.key):
            num_kept, kept_bytes = num_kept + 1, kept_bytes + artifact.bytes
            if not artifact.problem:
                complete.add(artifact.ref.key)
            continue
        ref = artifact.ref
        garbage.append(Garbage(ref.kind, ref.key, artifact.folder, artifact.bytes, artifact.changed_at, ref))
    claimed_keys = {ref.key for ref in claimed}
    resumable = claimed_keys | ({ref.key for ref in kept} - complete)
    garbage += _scratch(store, resumable, until)
    garbage += [
        Garbage("unfinished", path.name, path, folder_bytes(path), modified_at(path)) for path in dead_workspaces(store)
    ]
    gone = {each.name for each in garbage}
    garbage += _locks(store, {ref.key for ref in kept}, gone, until)
    return Clearing(tuple(garbage), num_kept, kept_bytes)


def _scratch(store: ArtifactStore, resumable: Collection[str], until: datetime) -> Iterator[Garbage]:
    for folder in scratch_folders(store):
        changed_at = modified_at(folder)
        if folder.name not in resumable and changed_at <= until and not _locked(store, folder.name):
            yield Garbage("scratch", folder.name, folder, folder_bytes(folder), changed_at)


def _locks(store: ArtifactStore, kept: Collection[str], gone: Collection[str], until: datetime) -> Iterator[Garbage]:
    """Lock files of keys that neither exist nor are wanted. Those of artifacts that go now go with them."""
    present = {artifact.ref.key for artifact in stored(store)} | {folder.name for folder in scratch_folders(store)}
    for path in sorted((store.root / ".locks").glob("*")):
        match = _LOCK_OF_KEY.fullmatch(path.name)
        if match and match["key"] not in {*present, *kept, *gone} and modified_at(path) <= until and not _held(path):
            yield Garbage("lock", path.name, path, 0, modified_at(path))


def _locked(store: ArtifactStore, key: str) -> bool:
    return _held(store.root / ".locks" / f"{key}.lock")


def _held(path: Path) -> bool:
    if not path.exists():
        return False
    with flocked(path, wait=False) as free:
        return not free


def _remove(store: ArtifactStore, garbage: Garbage, trash: Path) -> bool:
    """Move it to the trash; False if somebody has locked it since it was surveyed."""
    if garbage.ref is not None:
        return store.discard(garbage.ref, trash)
    if garbage.what == "unfinished":
        return True  # swept when the trash was opened, as by every writer
    lock = garbage.path if garbage.what == "lock" else store.root / ".locks" / f"{garbage.name}.lock"
    with flocked(lock, wait=False) as ours:
        if not ours:
            return False
        if garbage.what == "scratch" and garbage.path.exists():
            os.rename(garbage.path, trash / f"scratch.{garbage.name}")
        lock.unlink()
    return True
