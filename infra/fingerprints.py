"""What a local folder contains, as one short string: the identity of a model or data set that has no revision."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from infra.disk import digest as content_hash
from infra.errors import SourceInvalid

# A file written just now may change again without its mtime moving, as git knows ("racy git"): only older files count.
_SETTLED_NS = 2_000_000_000

_Memo = dict[str, tuple[int, int, str]]


def fingerprint(folder: Path, memo: Path | None = None) -> str:
    """sha256 (hex) over (relative path, size, content hash) of every file under `folder`, or over one single file.

    Neither the folder's own name and place nor dates enter. Hidden files and `__pycache__` are left out. With `memo`
    (a JSON file) content hashes are remembered by (path, size, mtime_ns), so that a 14 GB model is read once and not
    on every run.
    """
    known = _read(memo)
    fresh: _Memo = {}
    digest = hashlib.sha256()
    for name, file in _files(folder):
        stat = file.stat()
        key = str(file.absolute())
        size, mtime_ns, content = known.get(key, (-1, -1, ""))
        if (size, mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            content = content_hash(file)
            if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
                fresh[key] = (stat.st_size, stat.st_mtime_ns, content)
        digest.update(f"{name}\0{stat.st_size}\0{content}\n".encode())
    if memo is not None and fresh:
        _remember(memo, fresh)
    return digest.hexdigest()


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
        return {
            key: (int(size), int(mtime), str(content))
            for key, (size, mtime, content) in json.loads(memo.read_bytes()).items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # a memo only saves time: without it everything is hashed again


def _remember(memo: Path, fresh: _Memo) -> None:
    # Read again, since another process may have added its own meanwhile; a lost race costs a second hashing, never a
    # wrong one.
    text = json.dumps(_read(memo) | fresh, indent=0)
    aside = memo.with_name(f"{memo.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(memo)
