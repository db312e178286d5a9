"""What is exported is whole or not there: written aside, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import SourceInvalid
from infra.filesystem.disk import full_disk_named


def check_place(out: Path) -> None:
    """Raise SourceInvalid unless something can be written at `out`: a name that is free, or an empty folder."""
    if out.is_dir() and any(out.iterdir()):
        raise SourceInvalid(f"{out} is a folder with something in it, which is not overwritten: give a new name")
    if out.exists() and not out.is_dir():
        raise SourceInvalid(f"{out} is there already and is not overwritten: give a new name, or remove it")
    if not out.parent.is_dir():
        raise SourceInvalid(f"{out} cannot be written: the folder {out.parent} does not exist")


@contextmanager
def file_aside(out: Path) -> Iterator[Path]:
    """The path of a file that becomes `out` when the block ends, and vanishes if it raises; as `written_aside`."""
    check_place(out)
    if out.is_dir():
        raise SourceInvalid(f"{out} is a folder, and one file is written: give its name")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with full_disk_named(out.parent):
            yield aside
            aside.rename(out)
    except PermissionError as error:
        raise SourceInvalid(f"{out} cannot be written ({error.strerror}): give another place") from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends, and vanishes if it raises. Raises DiskFull, and
    SourceInvalid for a place that is taken or cannot be written."""
    check_place(out)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with full_disk_named(out.parent):
            aside.mkdir()
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():  # weights are written for their owner alone
                    file.chmod(0o644)
            if out.is_dir():
                out.rmdir()  # empty
            aside.rename(out)
    except PermissionError as error:
        raise SourceInvalid(f"{out} cannot be written ({error.strerror}): give another place") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
