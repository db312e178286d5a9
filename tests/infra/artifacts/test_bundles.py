"""A run in a file: whole, verified before anything is visible, and never trusted."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from infra.artifacts.bundle_reader import ImportedBundle, import_bundle, read_bundle
from infra.artifacts.bundle_writer import CONTENTS, Contents, contents_of, member_name, write_bundle
from infra.artifacts.inventory import stored
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import ArtifactMissing, BundleInvalid, DiskFull, StoreInUse
from infra.filesystem.locks import flocked
from infra.results.store import ResultsStore, RunRow
from tests.infra.artifacts.test_inventory import ONE, TWO, flip, write
from tests.infra.processes import kill_after_line, start

RUN_KEY = "run-x-v1-0123456789abcdef"
ROW = RunRow(
    run_key=RUN_KEY,
    name="x",
    spec="{}",
    status="completed",
    started_at=datetime(2026, 1, 1, tzinfo=UTC),
    finished_at=datetime(2026, 1, 2, tzinfo=UTC),
    slimline_version="1",
)
BIG = b"0123456789abcdef" * 70_000  # more than one chunk


def results(folder: Path) -> ResultsStore:
    return ResultsStore(folder / "results.duckdb")


@pytest.fixture
def here(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "here" / "store")
    with store.writing(ONE, request={"seed": 1}, versions={"torch": "2"}) as folder:
        (folder / "model.safetensors").write_bytes(BIG)
        (folder / "inner").mkdir()
        (folder / "inner" / "empty.json").write_bytes(b"")
    write(store, TWO)
    results(tmp_path / "here").record(ROW)
    return store


@pytest.fixture
def there(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "there" / "store")


def exported(store: ArtifactStore, out: Path) -> Path:
    rows = results(store.root.parent).export_file(RUN_KEY).read_bytes()
    write_bundle(store, contents_of(store, RUN_KEY, "x", [ONE, TWO], rows), rows, out, lambda size: None)
    return out


@pytest.fixture
def bundle(here: ArtifactStore, tmp_path: Path) -> Path:
    return exported(here, tmp_path / "run.tar")


def imported(store: ArtifactStore, path: Path, progress: Callable[[int], None] = lambda size: None) -> ImportedBundle:
    return import_bundle(store, read_bundle(path), results(store.root.parent).add_file, progress)


def test_what_goes_out_comes_in(here: ArtifactStore, there: ArtifactStore, bundle: Path) -> None:
    sizes: list[int] = []
    taken = imported(there, bundle, sizes.append)
    assert taken.new == (ONE, TWO)
    assert sum(sizes) == taken.contents.bytes
    for ref in (ONE, TWO):
        assert there.verify(ref) == []
        assert there.manifest(ref) == here.manifest(ref)  # when it was made, from what, and how long it took
    assert results(there.root.parent).runs() == (ROW,)
    assert os.listdir(there.root / ".scratch") == os.listdir(there.root / ".writing") == []
    again = imported(there, bundle)
    assert again.new == ()
    assert results(there.root.parent).runs() == (ROW,)


def test_a_complete_artifact_is_not_replaced_and_a_broken_one_is(there: ArtifactStore, bundle: Path) -> None:
    write(there, TWO, b"my own")
    write(there, ONE, b"broken")
    (there.path(ONE) / "model.safetensors").write_bytes(b"")
    assert imported(there, bundle).new == (ONE,)
    assert (there.path(TWO) / "model.safetensors").read_bytes() == b"my own"
    assert there.verify(ONE) == []


def test_export_refuses_what_has_changed_and_leaves_no_half_file(here: ArtifactStore, tmp_path: Path) -> None:
    good = exported(here, tmp_path / "run.tar").read_bytes()
    flip(here.path(ONE))
    with pytest.raises(ArtifactMissing, match=r"model.safetensors of checkpoint .* has changed .*verify --remove"):
        exported(here, tmp_path / "run.tar")
    assert (tmp_path / "run.tar").read_bytes() == good
    (here.path(ONE) / "inner" / "empty.json").unlink()
    with pytest.raises(ArtifactMissing, match=r"empty.json is missing"):
        exported(here, tmp_path / "run.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "run.tar"]
    with flocked(tmp_path / ".other.tar.slimline-part"), pytest.raises((StoreInUse, ArtifactMissing)):
        exported(here, tmp_path / "other.tar")


def test_export_leaves_a_part_file_of_somebody_elses(here: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "run.tar.part").write_text("half a download")
    exported(here, tmp_path / "run.tar")
    assert (tmp_path / "run.tar.part").read_text() == "half a download"


def test_a_file_cut_anywhere_is_refused(there: ArtifactStore, bundle: Path) -> None:
    whole = bundle.read_bytes()
    with tarfile.open(bundle) as tar:
        members = list(tar)
    boundaries = [member.offset for member in members] + [member.offset_data for member in members]
    last = members[-1].offset_data + members[-1].size
    for length in {0, 1, 100, 511, *boundaries, last - 1, len(BIG), len(BIG) // 2}:
        bundle.write_bytes(whole[:length])
        with pytest.raises(BundleInvalid):
            imported(there, bundle)
    assert list(stored(there)) == []
    assert results(there.root.parent).runs() == ()


def test_a_changed_byte_anywhere_is_refused_and_nothing_is_visible(there: ArtifactStore, bundle: Path) -> None:
    whole = bundle.read_bytes()
    with tarfile.open(bundle) as tar:
        members = list(tar)[1:]
    for member in (member for member in members if member.size):
        content = bytearray(whole)
        content[member.offset_data + member.size // 2] ^= 1
        bundle.write_bytes(content)
        with pytest.raises(BundleInvalid, match=r"changed since the export; nothing was taken in"):
            imported(there, bundle)
        assert list(stored(there)) == []
        assert results(there.root.parent).runs() == ()
        shutil.rmtree(there.root / ".scratch")  # else what came out right is not read again
    bundle.write_bytes(whole)
    assert imported(there, bundle).new == (ONE, TWO)


def forged(path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> Path:
    """The bundle with its members changed in place by `change`."""
    with tarfile.open(path) as tar:
        members = [(member, reader.read() if (reader := tar.extractfile(member)) else b"") for member in tar]
    change(members)
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return path


def rename(name: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[-1][0].name = name

    return change


def special(kind: bytes, target: str = "/etc/passwd") -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[-1][0].type, members[-1][0].linkname = kind, target

    return change


def add(name: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members.append((tarfile.TarInfo(name), b"more"))

    return change


def twice(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append(members[-1])


def promise(old: str, new: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    """Also the list of contents lies, so that names agree."""

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[0] = (members[0][0], members[0][1].replace(old.encode(), new.encode()))
        for member, _ in members[1:]:
            member.name = member.name.replace(old, new)

    return change


FORGERIES = {
    "absolute": rename("/etc/cron.d/x"),
    "parent": rename("artifacts/../../../x"),
    "backslash": rename("artifacts\\..\\x"),
    "symbolic link": special(tarfile.SYMTYPE),
    "hard link": special(tarfile.LNKTYPE, CONTENTS),
    "link inside": special(tarfile.SYMTYPE, "model.safetensors"),
    "device": special(tarfile.CHRTYPE),
    "fifo": special(tarfile.FIFOTYPE),
    "unasked": add("artifacts/checkpoint/more/file"),
    "pickled": add("artifacts/checkpoint/more/pytorch_model.bin"),
    "trusting": add("artifacts/checkpoint/more/trusted_code.json"),
    "twice": twice,
    "missing": lambda members: members.pop(),
    "no list": lambda members: members.pop(0),
    "promised parent": promise("inner/empty.json", "../../empty.json"),
    "promised absolute": promise("inner/empty.json", "/tmp/empty.json"),
    "promised manifest": promise("inner/empty.json", "manifest.json"),
    "promised key": promise(ONE.key, "../up"),
    "promised kind": promise('"checkpoint"', '"..".."'),
    "newer": promise('"format": 1', '"format": 2'),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_bundles_are_refused(there: ArtifactStore, bundle: Path, tmp_path: Path, forgery: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    forged(bundle, FORGERIES[forgery])
    with pytest.raises(BundleInvalid) as caught:
        imported(there, bundle)
    assert "\n" not in str(caught.value)
    assert str(bundle) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_of_another_run_are_refused(here: ArtifactStore, there: ArtifactStore, tmp_path: Path) -> None:
    rows = results(here.root.parent).export_file(RUN_KEY).read_bytes()
    contents = contents_of(here, "run-y-v1-0123456789abcdef", "y", [ONE, TWO], rows)
    write_bundle(here, contents, rows, tmp_path / "run.tar", lambda size: None)
    with pytest.raises(BundleInvalid, match="is of run run-x"):
        imported(there, tmp_path / "run.tar")
    assert list(stored(there)) == []


@pytest.mark.parametrize("content", [b"", b"no tar", b"x" * 10_000])
def test_other_files_are_refused(there: ArtifactStore, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.tar"
    with pytest.raises(BundleInvalid, match="there is no file"):
        read_bundle(path)
    path.write_bytes(content)
    with pytest.raises(BundleInvalid, match=r"some\.tar"):
        read_bundle(path)


def test_a_killed_import_goes_on(here: ArtifactStore, there: ArtifactStore, bundle: Path) -> None:
    """Killed when all is extracted: nothing is visible, and nothing is extracted again."""
    code = """
import sys, time
from pathlib import Path
from infra.artifacts import bundle_reader
from tests.infra.artifacts.test_bundles import imported
from infra.artifacts.store import ArtifactStore
def hang(*arguments):
    print("extracted", flush=True)
    time.sleep(600)
bundle_reader._check_rows = hang
imported(ArtifactStore(Path(sys.argv[1])), Path(sys.argv[2]))
"""
    kill_after_line(start(code, there.root, bundle))
    assert list(stored(there)) == []
    (work,) = (there.root / ".scratch").iterdir()
    extracted = work / member_name(ONE, "model.safetensors")
    inode = extracted.stat().st_ino
    assert imported(there, bundle).new == (ONE, TWO)
    assert (there.path(ONE) / "model.safetensors").stat().st_ino == inode
    assert there.verify(ONE) == []


def test_too_little_disk_is_known_before(there: ArtifactStore, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.filesystem.disk.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFull, match="free"):
        imported(there, bundle)
    assert list(stored(there)) == []


def test_the_list_of_contents_names_everything(bundle: Path) -> None:
    with tarfile.open(bundle) as tar:
        names = tar.getnames()
        reader = tar.extractfile(CONTENTS)
        assert reader is not None
        contents = Contents.model_validate_json(reader.read())
    assert names[:2] == [CONTENTS, "run.parquet"]
    assert contents.refs == (ONE, TWO)
    assert set(names[2:]) == {
        member_name(ONE, "model.safetensors"),
        member_name(ONE, "inner/empty.json"),
        member_name(TWO, "model.safetensors"),
    }
    assert isinstance(contents.refs[0], ArtifactRef)
