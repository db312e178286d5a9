"""A run in one file: its rows and every artifact that its stages made, to be taken to another store.

A bundle is a plain tar: `bundle.json` (what follows, with all manifests), `run.parquet` (the rows), then
`artifacts/<kind>/<key>/<file>`. Nothing is compressed, since weights do not shrink, or whole in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from infra.artifacts.claims import claimed
from infra.artifacts.store import ArtifactRef, ArtifactStore, FileEntry, Manifest
from infra.errors import ArtifactMissing, StoreInUse
from infra.filesystem.disk import check_free, full_disk_named, sync_folder
from infra.filesystem.locks import flocked

CONTENTS = "bundle.json"
ROWS = "run.parquet"
_CHUNK = 2**20

Progress = Callable[[int], None]


class Contents(BaseModel):
    """The first member of a bundle: whose run it is, and every file that must follow."""

    model_config = ConfigDict(frozen=True)
    format: Literal[1] = 1
    run_key: str
    name: str
    exported_at: AwareDatetime
    rows: FileEntry
    artifacts: tuple[Manifest, ...]

    @property
    def refs(self) -> tuple[ArtifactRef, ...]:
        """References of all its artifacts, in the order of their files."""
        return tuple(manifest.ref for manifest in self.artifacts)

    @property
    def bytes(self) -> int:
        """Size of all files, rows included: what an export writes and an import reads."""
        return self.rows.bytes + sum(entry.bytes for manifest in self.artifacts for entry in manifest.files.values())


def member_name(ref: ArtifactRef, file: str) -> str:
    """Where a file of an artifact lies in a bundle."""
    return f"artifacts/{ref.kind}/{ref.key}/{file}"


def contents_of(store: ArtifactStore, run_key: str, name: str, refs: Sequence[ArtifactRef], rows: bytes) -> Contents:
    """What a bundle of these artifacts would hold. rows: the parquet file of the run. Raises ArtifactMissing."""
    return Contents(
        run_key=run_key,
        name=name,
        exported_at=datetime.now(UTC),
        rows=FileEntry(bytes=len(rows), sha256=hashlib.sha256(rows).hexdigest()),
        artifacts=tuple(store.manifest(ref) for ref in dict.fromkeys(refs)),
    )


def write_bundle(store: ArtifactStore, contents: Contents, rows: bytes, out: Path, progress: Progress) -> None:
    """Write a bundle to `out`, which appears when it is whole and replaces what was there.

    progress: told bytes as they are written. Raises ArtifactMissing if an artifact is gone or not what its manifest
    says, StoreInUse if somebody writes to the same file, DiskFull.
    """
    with claimed(store.root, contents.refs, f"export of {contents.run_key}"), _replaced(out, contents.bytes) as file:
        with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=_CHUNK) as tar:
            _add(tar, CONTENTS, io.BytesIO(text := contents.model_dump_json(indent=1).encode()), len(text))
            _add(tar, ROWS, io.BytesIO(rows), len(rows))
            progress(len(rows))
            for manifest in contents.artifacts:
                _add_artifact(tar, store.path(manifest.ref), manifest, progress)
        file.flush()
        os.fsync(file.fileno())


def _add_artifact(tar: tarfile.TarFile, folder: Path, manifest: Manifest, progress: Progress) -> None:
    for name, entry in manifest.files.items():
        with (folder / name).open("rb") as source:
            reader = HashingReader(source, progress)
            try:
                _add(tar, member_name(manifest.ref, name), reader, entry.bytes)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise _changed(manifest.ref, name) from error  # it is shorter than it was
        if reader.hexdigest() != entry.sha256:
            raise _changed(manifest.ref, name)


def _changed(ref: ArtifactRef, name: str) -> ArtifactMissing:
    return ArtifactMissing(
        f"{name} of {ref.kind} {ref.key} has changed since it was written; take it out with `slimline verify --remove` "
        "and run the spec again"
    )


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes] | HashingReader, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, content)  # it asks for no more than `read`


@contextmanager
def _replaced(out: Path, size: int) -> Iterator[IO[bytes]]:
    """A file that takes the place of `out` when the block ends, and vanishes if it raises."""
    part = out.with_name(f".{out.name}.slimline-part")  # `.part` alone is what others call theirs
    with full_disk_named(out.parent):
        check_free(out.parent, size)
        with flocked(part, wait=False) as ours:
            if not ours:
                raise StoreInUse(f"another process is writing {out}; wait for it or give another file")
            try:
                with part.open("wb") as file:
                    yield file
                os.replace(part, out)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            sync_folder(out.parent)


class HashingReader:
    """A file that is hashed while it is read."""

    def __init__(self, source: IO[bytes], progress: Progress) -> None:
        self._source, self._progress, self._hash = source, progress, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, hashed and counted."""
        chunk = self._source.read(size)
        self._hash.update(chunk)
        self._progress(len(chunk))
        return chunk

    def hexdigest(self) -> str:
        """sha256 of all that was read."""
        return self._hash.hexdigest()
