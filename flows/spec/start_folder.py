"""Where the relative paths of a spec start: in the folder in which it is read, which the spec notes for whoever runs it
later and elsewhere (`slimline retry`, a schedule, a worker). Cache keys hold the content of what a path leads to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel

from flows.errors import SpecError
from infra.settings import mirror_folders

S = TypeVar("S", bound=BaseModel)


def _absolute(folder: str) -> str:
    path = os.path.expanduser(folder)
    if not os.path.isabs(path):
        raise ValueError(f"{folder!r} is no absolute path; leave it out, and it is the folder where the spec is read")
    return path


StartFolder = Annotated[str, AfterValidator(_absolute)]


def with_start_folder(spec: S) -> S:
    """The spec with the current folder as its `folder`, if it has relative paths and names none. Raises SpecError if
    there is no current folder."""
    plain = spec.model_dump(mode="json")
    if plain.get("folder") is not None or not _has_relative_paths(plain):
        return spec
    try:
        folder = os.getcwd()
    except OSError as error:
        raise SpecError("relative paths start in the current folder, and that is gone; change to another") from error
    return type(spec).model_validate(plain | {"folder": folder})  # a copy would keep a night's cells as they are


def _has_relative_paths(plain: Any) -> bool:
    """Whether a model (`id`), a data set or a mirror is one, somewhere in the plain values of a spec."""
    if isinstance(plain, list):
        return any(map(_has_relative_paths, plain))
    if not isinstance(plain, Mapping):
        return False
    return any(
        _is_relative_path(value)
        if key in ("id", "dataset") and isinstance(value, str)
        else any(map(_is_relative, mirror_folders(value)))
        if key == "mirror" and value is not None
        else _has_relative_paths(value)
        for key, value in plain.items()
    )


def _is_relative_path(name: str) -> bool:
    """What is neither there nor looks like a path is the id of a repository."""
    return _is_relative(name) and (name.startswith(".") or os.path.exists(name))


def _is_relative(path: str) -> bool:
    return not os.path.isabs(os.path.expanduser(path))
