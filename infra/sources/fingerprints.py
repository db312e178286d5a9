"""What a local folder contains, as one short string: the identity of a model or data set that has no revision."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from time import time_ns
from typing import NamedTuple

from infra.errors import SourceInvalid

_SECOND_NS = 1_000_000_000
# A file changed just now may change again within the same tick, as git knows ("racy git"): only older changes count.
_SETTLED_NS = 2 * _SECOND_NS


class Stamp(NamedTuple):
    """By what a file is known again. The kernel alone sets ctime: whatever dates an archive, `touch` or `cp -p` gives
    a file, every write, rename and link moves it (git and restic go by it, too). A device or inode number that another
    mount or a network file system made anew only costs a second reading."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


_Memo = dict[str, tuple[Stamp, str]]


def fingerprint(folder: Path, memo: Path | None = None) -> str:
    """sha256 (hex) over (relative path, size, content hash) of every file under `folder`, or over one single file.

    Neither the folder's own name and place nor dates enter. Hidden files and `__pycache__` are left out. With `memo`
    (a JSON file) content hashes are remembered by path and Stamp, so that a 14 GB model is read once and not on every
    run. Raises SourceInvalid for a link in a circle, a file that cannot be read and one that is being written.
    """
    known = _read(memo)
    fresh: _Memo = {}
    digest = hashlib.sha256()
    for name, file in _files(folder):
        key = str(file.absolute())
        try:
            # opened even where it is not read: only then does a network file system tell what the file is like now
            with file.open("rb") as stream:
                found = stamp(os.fstat(stream.fileno()))
                before, content = known.get(key, (None, ""))
                if before != found:
                    content, settled = _read_whole(stream, found, file)
                    fresh |= {key: (found, content)} if settled else {}
        except OSError as error:
            raise SourceInvalid(f"{file} cannot be read ({error.strerror}); mend that or take it away") from error
        digest.update(f"{name}\0{found.size}\0{content}\n".encode())
    if memo is not None and fresh:
        _remember(memo, fresh)
    return digest.hexdigest()


def stamp(stat: os.stat_result) -> Stamp:
    """What is compared of a file's state."""
    return Stamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def hashed(stream: BufferedReader) -> str:
    """sha256 (hex) of an open file."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_whole(stream: BufferedReader, found: Stamp, file: Path) -> tuple[str, bool]:
    """The content hash, and whether the stamp stands for it from now on. Raises SourceInvalid."""
    begin_ns = time_ns()
    content = hashed(stream)
    after = stamp(os.fstat(stream.fileno()))
    if (after.size, after.mtime_ns) != (found.size, found.mtime_ns):
        raise SourceInvalid(f"{file} changed while it was read; run again when it is complete")
    return content, after == found and _is_settled(found, begin_ns)


def _is_settled(found: Stamp, now_ns: int) -> bool:
    """Whether a later change would show. Not with a ctime of just now or, where a clock was set, of the future; nor
    with one that is mtime in whole seconds: some file systems have no other (squashfs, FAT, sshfs)."""
    only_a_date = found.ctime_ns == found.mtime_ns and found.ctime_ns % _SECOND_NS == 0
    return now_ns - found.ctime_ns > _SETTLED_NS and not only_a_date


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    if folder.is_file():
        yield "", folder  # the content alone: a renamed file is the same data
        return
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        _refuse_circles(root, folders)
        for name in sorted(names):
            file = Path(root, name)
            if not name.startswith(".") and file.is_file():
                yield file.relative_to(folder).as_posix(), file


def _refuse_circles(root: str, folders: list[str]) -> None:
    """Links may lead anywhere but back: following those takes for ever."""
    here = Path(root).resolve()
    for name in folders:
        if os.path.islink(os.path.join(root, name)) and here.is_relative_to(Path(root, name).resolve()):
            raise SourceInvalid(f"{root}/{name} is a link to a folder that it lies in; remove it")


def _read(memo: Path | None) -> _Memo:
    if memo is None:
        return {}
    try:
        entries = dict(json.loads(memo.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}  # a memo only saves time: without it everything is hashed again
    known: _Memo = {}
    for key, entry in entries.items():
        with contextlib.suppress(ValueError, TypeError):  # of an older slimline: by size and mtime alone
            numbers, content = entry
            known[key] = (Stamp(*map(int, numbers)), str(content))
    return known


def _remember(memo: Path, fresh: _Memo) -> None:
    # Read again, since another process may have added its own meanwhile; a lost race costs a second hashing, never a
    # wrong one.
    text = json.dumps(_read(memo) | fresh, indent=0)
    aside = memo.with_name(f"{memo.name}.{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(memo)
