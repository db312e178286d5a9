"""Errors that no place of ours puts in words: which of them the user can mend, and what is said of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flows.runtime.user_errors import user_message
from flows.spec.validation import one_line
from infra.errors import SourceInvalid


def raised_by(path: Path, mode: str = "r") -> OSError:
    with pytest.raises(OSError, match=str(path.name)) as caught:
        path.open(mode)
    return caught.value


def test_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, words in [
        (tmp_path / "gone", "No such file or directory; see whether somebody removed it"),
        (tmp_path / "file/x", "Not a directory; a part of this path is a file where a folder is needed"),
        (tmp_path, "Is a directory; it is a folder where a file is needed"),
        (loop, "Too many levels of symbolic links; its symbolic links lead in a circle"),
        (tmp_path / ("a" * 300), "File name too long; give a shorter name or path"),
    ]:
        said = user_message(raised_by(path))
        assert said is not None
        assert said.startswith(f"{path}: {words}")


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EIO]
)
def test_of_a_disk_and_its_rights(number: int) -> None:
    said = user_message(OSError(number, os.strerror(number), "/data/x"))
    assert said is not None
    assert said.startswith(f"/data/x: {os.strerror(number)}; ")


def test_the_cause_of_an_error_counts() -> None:
    outer = RuntimeError("the loader failed")
    outer.__cause__ = PermissionError(errno.EACCES, "Permission denied", "/data/x")
    assert user_message(outer) == "/data/x: Permission denied; give this user the permission, or name another place"


def test_of_memory() -> None:
    said = user_message(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert said is not None
    assert said.startswith("memory ran out (CUDA out of memory. Tried to allocate 2 GiB); ask for smaller batches")


def test_of_ours() -> None:
    assert user_message(SourceInvalid("what is wrong; the way out")) == "what is wrong; the way out"


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a bug"),
        ValueError("a bug"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        OSError(errno.ENOENT, "of a call of the system"),
        OSError("without a number"),
    ],
)
def test_what_the_user_cannot_mend(error: Exception) -> None:
    assert user_message(error) is None


def test_one_line_is_what_a_terminal_can_show() -> None:
    assert one_line(" a\nb\tc ") == "a b c"
    assert one_line("\x1b[31mred\u202e\ud800\x00") == r"\x1b[31mred\u202e\ud800\x00"
    assert one_line("ä日本🙂") == "ä日本🙂"
    assert one_line(f"first {'a' * 5000} last").startswith("first aaa")
    assert one_line(f"first {'a' * 5000} last").endswith("aaa last")
    assert len(one_line("many words " * 5000)) < 1500
