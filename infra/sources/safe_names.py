"""Paths that a spec or a data set names stay inside the folder or repository that they are said to belong to.

What lies outside is not in the content that a cache key stands for, and need not be meant for others' eyes. A folder
that the user names as such (`/data/texts`, `./model`) is theirs to name; so is a mirror, which may be made of symbolic
links: the hub's own cache is. What links lead to is read as content of the mirror, and hashed as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from infra.errors import SourceInvalid, YamlInvalid
from infra.strict_yaml import load_yaml

#: owner/name or name, as on the hub
_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
#: a branch, tag or commit as git allows them, or rather a little less
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+@-]*(/[A-Za-z0-9_][\w.+@-]*)*")
#: what names a configuration or split: also slices, as in train[:10%], and joined splits
_NAME = re.compile(r"[^/\\<>|?*\0]*")


def stays_inside(path: str) -> bool:
    """Whether a relative path or pattern names nothing outside the folder it starts from, nor anything of a network."""
    parts = PurePosixPath(path).parts
    strange = any(piece in path for piece in ("::", "://", "\\", "\0", "\n"))
    return bool(parts) and not (strange or ".." in parts or path.startswith(("/", "~")))


def is_repository_id(repo_id: str) -> bool:
    """Whether it can be the id of a repository (owner/name), and so the name of a folder in a mirror."""
    return _ID.fullmatch(repo_id) is not None and ".." not in repo_id and len(repo_id) <= 200


def check_revision(revision: str | None) -> str | None:
    """The revision; ValueError if no branch, tag or commit can be called so."""
    if revision is not None and (_REVISION.fullmatch(revision) is None or ".." in revision):
        raise ValueError(f"{revision!r} is no name of a branch, tag or commit")
    return revision


def check_data_files(data_files: str | None) -> str | None:
    """The path or pattern of data files; ValueError if it leaves the data set."""
    if data_files is not None and not stays_inside(data_files):
        raise ValueError(
            f"{data_files!r} leaves the data set; give a path or pattern inside it, or the folder or file itself as "
            "`dataset`"
        )
    return data_files


def check_name(name: str | None) -> str | None:
    """The name of a configuration or split; ValueError if it is rather a path."""
    if name is not None and (_NAME.fullmatch(name) is None or ".." in name):
        raise ValueError(f"{name!r} is no name of a configuration or split; leave out slashes, wildcards and '..'")
    return name


def check_card(folder: Path, repo_id: str) -> None:
    """Refuse a local data set whose README makes `datasets` read files elsewhere. Raises SourceInvalid."""
    for name in ("README.md", ".huggingface.yaml"):
        for path in _promised_files(folder / name, repo_id):
            if not stays_inside(path):
                raise SourceInvalid(
                    f"{name} of {repo_id} names data files outside the data set ({path!r}); put them inside and name "
                    "them there"
                )


def _promised_files(file: Path, repo_id: str) -> Iterator[str]:
    """Every path that the `configs` of a card name."""
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
    header = text if file.suffix != ".md" else parts[1] if len(parts) == 3 else ""
    try:
        card = load_yaml(header)
    except YamlInvalid as error:
        line = f" (line {error.line})" if error.line else ""
        raise SourceInvalid(
            f"{file.name} of {repo_id} begins with YAML that cannot be read{line}: {error}; mend it or fetch it again"
        ) from error
    configs = card.get("configs") if isinstance(card, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield from _strings(config.get("data_files"))
            yield from _strings(config.get("data_dir"))


def _strings(value: Any) -> Iterator[str]:
    """Paths in the several forms that `data_files` may have: a string, a list, {split: ...}, [{split, path}]."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "split":
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
