"""Durable files, and one clear sentence when a disk is full or a folder cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import DiskFull, InfraError, StoreUnwritable

_WAY_OUT = "free space there or set SLIMLINE_HOME to a folder on a larger disk"


@contextmanager
def full_disk_named(root: Path) -> Iterator[None]:
    """Turn an error inside that a full disk caused into DiskFull, with the path, what is free, and the way out."""
    try:
        yield
    except InfraError:
        raise
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFull(
            f"the disk of {root} became full while writing ({_gib(free_bytes(root))} free now that the "
            f"unfinished files are removed); {_WAY_OUT}"
        ) from error


def check_free(root: Path, min_free_bytes: int) -> None:
    """Raise DiskFull if the disk of `root` has less than `min_free_bytes`."""
    free = free_bytes(root)
    if free < min_free_bytes:
        raise DiskFull(f"the disk of {root} has {_gib(free)} free and {_gib(min_free_bytes)} are needed; {_WAY_OUT}")


def check_writable(root: Path) -> None:
    """Create `root` if needed and write a file in it. Raises StoreUnwritable or DiskFull."""
    make_folder(root)
    with full_disk_named(root):
        try:
            with tempfile.TemporaryFile(dir=root) as probe:
                probe.write(b"slimline")
                probe.flush()
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise _unwritable(root, error) from error


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written in `folder` although it may be made first, None if nothing is known. Makes nothing."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        return f"{existing} is no folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written in"
    return None


def make_folder(folder: Path) -> Path:
    """Create `folder` with its parents and return it. Raises StoreUnwritable or DiskFull."""
    with full_disk_named(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise _unwritable(folder, error) from error
    return folder


def free_bytes(folder: Path) -> int:
    """Bytes free for us on the disk of `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` so that it is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk: without this a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, *, sync: bool = False) -> str:
    """sha256 (hex) of a file; with `sync` also forces it to the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota) is behind `error`, also a wrapped one: safetensors keeps only the text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unwritable(folder: Path, error: OSError) -> StoreUnwritable:
    reason = error.strerror or str(error)
    return StoreUnwritable(f"cannot write in {folder} ({reason}); make it writable or set SLIMLINE_HOME elsewhere")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
