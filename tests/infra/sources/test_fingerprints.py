"""The memo of file hashes: whatever is done to a file, the fingerprint is right; and what is untouched is not read."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import SourceInvalid
from infra.settings import Settings
from infra.sources import fingerprints
from infra.sources.find import Sources, TextData
from infra.sources.fingerprints import fingerprint

BEFORE, AFTER = b"the old weights", b"the new weights"
A_SECOND = 1_000_000_000
LONG_AGO = 1_000_000_000 * A_SECOND


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds have passed since the files were written."""
    clock = time.time_ns
    monkeypatch.setattr(fingerprints, "time_ns", lambda: clock() + 3 * A_SECOND)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def a_tick_later(way: Callable[[Path], None], file: Path) -> None:
    """Clocks of file systems tick every few milliseconds, and `settled` has taken the time in between away."""
    time.sleep(0.03)
    way(file)


def other(file: Path) -> Path:
    """A file of the same size and date, elsewhere on the disk."""
    return put(file.parent.parent / "elsewhere/file", AFTER)


def overwrite(file: Path) -> None:
    file.write_bytes(AFTER)
    os.utime(file, ns=(LONG_AGO, LONG_AGO))


def copy_over(file: Path) -> None:
    shutil.copy2(other(file), file)


def rename_over(file: Path) -> None:
    other(file).replace(file)


def link_over(file: Path) -> None:
    new = other(file)
    file.unlink()
    file.hardlink_to(new)


def write_through_the_other_name(file: Path) -> None:
    twin = file.parent.parent / "twin"
    twin.hardlink_to(file)
    overwrite(twin)


def delete_and_create(file: Path) -> None:
    """The new file often has the inode of the old one."""
    file.unlink()
    overwrite(file)


def unpack_with_constant_dates(file: Path) -> None:
    new, archive = other(file), file.parent.parent / "model.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(new, file.name)
    with tarfile.open(archive) as tar:
        tar.extractall(file.parent, filter="data")
    assert file.stat().st_mtime_ns == LONG_AGO


def touch_by_reference(file: Path) -> None:
    reference = put(file.parent.parent / "reference", b"")
    file.write_bytes(AFTER)
    subprocess.run(["touch", "-r", reference, file], check=True)


def write_a_map(file: Path) -> None:
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
        memory[:] = AFTER
        memory.flush()
    os.utime(file, ns=(LONG_AGO, LONG_AGO))


def swap_the_folder(file: Path) -> None:
    new = put(file.parent.parent / "other" / file.name, AFTER)
    file.parent.rename(file.parent.parent / "gone")
    new.parent.rename(file.parent)


def point_the_link_elsewhere(file: Path) -> None:
    new = other(file)
    file.unlink()
    file.symlink_to(new)


def replace_what_the_link_leads_to(file: Path) -> None:
    other(file).replace(file.resolve())


WAYS: list[Callable[[Path], None]] = [
    overwrite, copy_over, rename_over, link_over, write_through_the_other_name, delete_and_create,
    unpack_with_constant_dates, touch_by_reference, write_a_map, swap_the_folder, point_the_link_elsewhere,
    replace_what_the_link_leads_to,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_file_of_the_same_size_and_date_is_told_from_the_old_one(
    way: Callable[[Path], None], settled: None, tmp_path: Path
) -> None:
    file, memo = put(tmp_path / "model/model.safetensors", BEFORE), tmp_path / "memo.json"
    if way is replace_what_the_link_leads_to:
        shutil.move(file, tmp_path / "blob")
        file.symlink_to(tmp_path / "blob")
    old = fingerprint(file.parent, memo)
    assert str(file) in json.loads(memo.read_text())
    a_tick_later(way, file)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (AFTER, LONG_AGO)
    assert fingerprint(file.parent, memo) == fingerprint(file.parent) != old


@pytest.mark.parametrize("way", [copy_over, rename_over, overwrite], ids=lambda way: way.__name__)
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_data_of_the_same_size_and_date_is_read_anew(
    way: Callable[[Path], None], whole: bool, settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "AFTER", b'{"text": "new"}\n')
    file = put(tmp_path / "data/train.jsonl", b'{"text": "old"}\n')
    settings, data = Settings(home=tmp_path / "home"), TextData(dataset=str(file.parent if whole else file))

    def texts() -> list[str]:
        return Sources((), None, False, home=settings.home).texts(data)

    assert texts() == ["old"]
    a_tick_later(way, file)
    assert texts() == ["new"]


def test_what_is_untouched_is_not_read_again(settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [put(tmp_path / "model" / name, BEFORE) for name in ("a.safetensors", "b.safetensors")]
    memo, read = tmp_path / "memo.json", []
    hashed = fingerprints.hashed
    monkeypatch.setattr(fingerprints, "hashed", lambda stream: read.append(Path(stream.name)) or hashed(stream))
    first = fingerprint(tmp_path / "model", memo)
    assert read == files
    assert fingerprint(tmp_path / "model", memo) == first
    assert read == files
    a_tick_later(overwrite, files[1])
    assert fingerprint(tmp_path / "model", memo) != first
    assert read == [*files, files[1]]


@pytest.mark.parametrize(
    ("behind_ns", "changed_ns", "known"),
    [
        (3 * A_SECOND, 1, True),
        (A_SECOND, 1, False),  # it may change again within the same tick
        (-3600 * A_SECOND, 1, False),  # our clock was set back, or the file's stands in the future
        (3 * A_SECOND, 0, False),  # as where there is no ctime: it is the date, in whole seconds
        (5 * A_SECOND, A_SECOND, True),  # a file system that ticks slowly
    ],
)
def test_only_a_settled_time_of_change_is_relied_on(
    behind_ns: int, changed_ns: int, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memo = put(tmp_path / "model/weights", BEFORE), tmp_path / "memo.json"
    state = fingerprints.stamp(os.stat(file))._replace(ctime_ns=LONG_AGO + changed_ns)
    monkeypatch.setattr(fingerprints, "stamp", lambda stat: state)
    monkeypatch.setattr(fingerprints, "time_ns", lambda: LONG_AGO + behind_ns)
    fingerprint(file.parent, memo)
    assert memo.exists() is known


def test_a_file_dated_in_the_future_is_remembered_all_the_same(settled: None, tmp_path: Path) -> None:
    """Its date is what somebody set; when it was changed is what the kernel knows."""
    file, memo = put(tmp_path / "model/weights", BEFORE), tmp_path / "memo.json"
    os.utime(file, (2**32, 2**32))
    fingerprint(file.parent, memo)
    assert str(file) in json.loads(memo.read_text())


def test_an_older_memo_is_a_miss_and_goes(settled: None, tmp_path: Path) -> None:
    file, memo = put(tmp_path / "model/weights", BEFORE), tmp_path / "memo.json"
    right = fingerprint(file.parent)
    state = file.stat()
    memo.write_text(json.dumps({str(file): [state.st_size, state.st_mtime_ns, "0" * 64], "/gone": [1, 2, "1" * 64]}))
    assert fingerprint(file.parent, memo) == right
    assert list(json.loads(memo.read_text())) == [str(file)]
    assert fingerprint(file.parent, memo) == right


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": [[1, 2], "x"]}', '{"a": [[1, 2, 3, 4, null], 5]}'])
def test_a_memo_that_cannot_be_read_is_no_memo(text: str, settled: None, tmp_path: Path) -> None:
    file, memo = put(tmp_path / "model/weights", BEFORE), tmp_path / "memo.json"
    memo.write_text(text)
    assert fingerprint(file.parent, memo) == fingerprint(file.parent)
    assert list(json.loads(memo.read_text())) == [str(file)]


def test_a_file_that_is_being_written_has_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, hashed = put(tmp_path / "model/weights", BEFORE), fingerprints.hashed

    def while_somebody_writes(stream: object) -> str:
        with file.open("ab") as more:
            more.write(b"more")
        return hashed(stream)  # type: ignore[arg-type]

    monkeypatch.setattr(fingerprints, "hashed", while_somebody_writes)
    with pytest.raises(SourceInvalid, match="weights changed while it was read; run again when it is complete"):
        fingerprint(file.parent)
