from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.artifacts.store import MANIFEST, ArtifactRef, ArtifactStore, Manifest
from infra.errors import ArtifactMissing, DiskFull, StoreUnwritable
from infra.filesystem.disk import full_disk_named
from tests.infra.processes import finish, kill_after_line, start

REF = ArtifactRef(kind="checkpoint", key="prune-slimgpt-v1-0123456789abcdef")

# A process that writes REF in the store argv[1] and stops in the middle until it is killed.
HALF_WRITER = """
import sys, time
from pathlib import Path
from infra.artifacts.store import ArtifactStore
from tests.infra.artifacts.test_store import REF
with ArtifactStore(Path(sys.argv[1])).writing(REF, request={}, versions={}, replace=len(sys.argv) > 2) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def write(store: ArtifactStore, content: bytes = b"weights", *, replace: bool = False) -> None:
    with store.writing(REF, request={"seed": 1}, versions={"torch": "2"}, replace=replace) as folder:
        (folder / "model.safetensors").write_bytes(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "config.json").write_text("{}")


def content(store: ArtifactStore) -> bytes:
    return (store.path(REF) / "model.safetensors").read_bytes()


def unfinished(store: ArtifactStore) -> list[str]:
    return sorted(os.listdir(store.root / ".writing"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_written_artifact_is_complete(store: ArtifactStore) -> None:
    assert not store.has(REF)
    write(store)
    assert store.has(REF)
    assert store.path(REF) == store.root / "checkpoint" / REF.key
    assert content(store) == b"weights"
    assert store.verify(REF) == []
    assert unfinished(store) == []


def test_manifest_says_what_was_made_from_what(store: ArtifactStore) -> None:
    write(store)
    manifest = store.manifest(REF)
    assert manifest.ref == REF
    assert manifest.request == {"seed": 1}
    assert manifest.versions == {"torch": "2"}
    assert sorted(manifest.files) == ["inner/config.json", "model.safetensors"]
    assert manifest.files["model.safetensors"].bytes == 7
    assert 0 <= manifest.seconds < 10
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_missing_artifact_is_one_sentence(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactMissing, match=f"checkpoint {REF.key} is not in the store .*; run the stage"):
        store.path(REF)


@pytest.mark.parametrize("key", ["../x", "a/b", "", ".hidden", "A", "x" * 201])
def test_keys_that_are_no_folder_names_are_refused(key: str) -> None:
    with pytest.raises(ValidationError):
        ArtifactRef(kind="report", key=key)


def test_an_error_inside_leaves_nothing(store: ArtifactStore) -> None:
    def fail() -> None:
        with store.writing(REF, request={}, versions={}) as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        fail()
    assert not store.has(REF)
    assert unfinished(store) == []


def test_kill_in_the_middle_leaves_nothing_visible_and_the_next_write_cleans_up(store: ArtifactStore) -> None:
    half_made = Path(kill_after_line(start(HALF_WRITER, store.root)))
    assert half_made.exists()
    assert not store.has(REF)
    with pytest.raises(ArtifactMissing):
        store.path(REF)
    write(store)
    assert store.verify(REF) == []
    assert not half_made.exists()
    assert unfinished(store) == []


def test_preflight_cleans_up_after_the_dead_but_not_the_living(store: ArtifactStore) -> None:
    dead = Path(kill_after_line(start(HALF_WRITER, store.root)))
    living = start(HALF_WRITER, store.root)
    assert living.stdout is not None
    at_work = Path(living.stdout.readline().strip())
    try:
        store.preflight()
        assert not dead.exists()
        assert at_work.exists()
    finally:
        living.kill()
        living.communicate()


def test_kill_while_replacing_keeps_the_old_one(store: ArtifactStore) -> None:
    write(store, b"old")
    kill_after_line(start(HALF_WRITER, store.root, "replace"))
    assert store.has(REF)
    assert content(store) == b"old"
    write(store, b"new", replace=True)
    assert content(store) == b"new"


def test_replace_keeps_the_old_one_until_the_new_one_is_complete(store: ArtifactStore) -> None:
    write(store, b"old")
    with store.writing(REF, request={}, versions={}, replace=True) as folder:
        (folder / "model.safetensors").write_bytes(b"new")
        assert store.has(REF)
        assert content(store) == b"old"
    assert content(store) == b"new"
    assert unfinished(store) == []


def test_a_failed_replacement_keeps_the_old_one(store: ArtifactStore) -> None:
    write(store, b"old")
    with pytest.raises(RuntimeError), store.writing(REF, request={}, versions={}, replace=True):
        raise RuntimeError
    assert content(store) == b"old"


def test_whoever_was_complete_first_wins(store: ArtifactStore) -> None:
    with store.writing(REF, request={}, versions={}) as folder:
        (folder / "model.safetensors").write_bytes(b"late")
        write(store, b"early")
    assert content(store) == b"early"
    assert store.verify(REF) == []


def test_two_processes_write_the_same_artifact_at_once(store: ArtifactStore) -> None:
    code = """
import sys, time
from pathlib import Path
from infra.artifacts.store import ArtifactStore
from tests.infra.artifacts.test_store import REF
store = ArtifactStore(Path(sys.argv[1]))
for _ in range(100):
    with store.writing(REF, request={"by": sys.argv[2]}, versions={}, replace=sys.argv[3] == "replace") as folder:
        for part in range(3):
            (folder / f"{part}").write_text(sys.argv[2])
    found = store.path(REF) if sys.argv[3] != "replace" else None
"""
    for mode in ("keep", "replace"):
        for child in [start(code, store.root, name, mode) for name in ("a", "b")]:
            finish(child)
        assert store.verify(REF) == []
        parts = {(store.path(REF) / str(part)).read_text() for part in range(3)}
        assert parts == {store.manifest(REF).request["by"]}
        assert unfinished(store) == []


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"w")


def delete_file(folder: Path) -> None:
    (folder / "inner" / "config.json").unlink()


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"ref": ')


def delete_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def foreign_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace(REF.key, "prune-other-v1-0"))


def delete_folder(folder: Path) -> None:
    shutil.rmtree(folder)


DAMAGES = [truncate, delete_file, break_manifest, delete_manifest, foreign_manifest, delete_folder]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_a_miss_with_exactly_one_warning(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    write(store)
    assert callable(damage)
    damage(store.path(REF))
    assert [store.has(REF), store.has(REF), ArtifactStore(store.root).has(REF)] == [False] * 3
    assert len(warnings(caplog)) == 1
    assert REF.key in warnings(caplog)[0]
    with pytest.raises(ArtifactMissing):
        store.path(REF)
    write(store, b"again")
    assert content(store) == b"again"
    assert store.verify(REF) == []
    damage(store.path(REF))
    assert not store.has(REF)
    assert len(warnings(caplog)) == 2


def test_what_was_never_there_is_no_reason_for_a_warning(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert not store.has(REF)
    kill_after_line(start(HALF_WRITER, store.root))
    assert not store.has(REF)
    assert warnings(caplog) == []


def test_has_reads_no_file(store: ArtifactStore) -> None:
    with store.writing(REF, request={}, versions={}) as folder, (folder / "model.safetensors").open("wb") as file:
        file.truncate(2**28)  # sparse; hashing it takes half a second
    started = time.process_time()
    assert store.has(REF)
    assert time.process_time() - started < 0.05


def test_verify_finds_what_sizes_do_not_show(store: ArtifactStore) -> None:
    write(store)
    (store.path(REF) / "model.safetensors").write_bytes(b"weightz")
    (store.path(REF) / "extra").write_bytes(b"")
    (store.path(REF) / "inner" / "config.json").unlink()
    assert store.verify(REF) == [
        "extra is not in the manifest",
        "inner/config.json is missing",
        "model.safetensors has changed since it was written",
    ]


def test_our_own_mistakes_are_assertions(store: ArtifactStore) -> None:
    with pytest.raises(AssertionError, match="without files"), store.writing(REF, request={}, versions={}):
        pass
    with pytest.raises(AssertionError, match="own its bytes"), store.writing(REF, request={}, versions={}) as folder:
        (folder / "model.safetensors").symlink_to("/etc/hostname")
    assert not store.has(REF)
    assert unfinished(store) == []


def test_lock_keeps_others_out_and_is_freed_by_a_kill(store: ArtifactStore) -> None:
    code = """
import sys, time
from pathlib import Path
from infra.artifacts.store import ArtifactStore
from tests.infra.artifacts.test_store import REF
with ArtifactStore(Path(sys.argv[1])).lock(REF):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
    holder = start(code, store.root, 600)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waiter = start(code, store.root, 0)
    time.sleep(1.0)
    assert waiter.poll() is None
    holder.kill()
    holder.communicate()
    assert finish(waiter) == "held"
    with store.lock(REF):
        write(store)  # the holder of the lock is the one who writes
    assert store.has(REF)


def test_scratch_outlives_a_kill(store: ArtifactStore) -> None:
    code = """
import sys, time
from pathlib import Path
from infra.artifacts.store import ArtifactStore
from tests.infra.artifacts.test_store import REF
(ArtifactStore(Path(sys.argv[1])).scratch(REF) / "layer-7").write_text("done")
print("written", flush=True)
time.sleep(600)
"""
    kill_after_line(start(code, store.root))
    write(store)
    assert (store.scratch(REF) / "layer-7").read_text() == "done"
    store.drop_scratch(REF)
    store.drop_scratch(REF)
    assert list(store.scratch(REF).iterdir()) == []


def test_preflight_finds_out_early(store: ArtifactStore, tmp_path: Path) -> None:
    store.preflight()
    store.preflight(min_free_bytes=1)
    with pytest.raises(DiskFull, match=r"GiB free and 931322574\.62 GiB are needed; free space .*SLIMLINE_HOME"):
        store.preflight(min_free_bytes=10**18)
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file" / "store", tmp_path / "file", Path("/proc/slimline")):
        with pytest.raises(StoreUnwritable, match=f"cannot write in {root} .*SLIMLINE_HOME"):
            ArtifactStore(root).preflight()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_really_full_disk(tiny_disk: Path) -> None:
    store = ArtifactStore(tiny_disk / "store")
    write(store, b"old")
    with pytest.raises(DiskFull, match=rf"the disk of {store.root} became full .*0\.00 GiB free.*SLIMLINE_HOME"):
        write(store, bytes(2**21), replace=True)
    assert content(store) == b"old"
    assert store.verify(REF) == []
    assert unfinished(store) == []
    with pytest.raises(DiskFull):
        store.preflight(min_free_bytes=2**21)


def test_a_full_disk_under_safetensors(tiny_disk: Path) -> None:
    numpy = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    store = ArtifactStore(tiny_disk / "store")
    with pytest.raises(DiskFull), store.writing(REF, request={}, versions={}) as folder:
        save_file({"weight": numpy.zeros(2**19)}, str(folder / "model.safetensors"))
    assert unfinished(store) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_seen_through_wrapping_errors(tmp_path: Path, number: int) -> None:
    def fail() -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("could not write shard 3") from error

    with pytest.raises(DiskFull), full_disk_named(tmp_path / "not" / "there" / "yet"):
        fail()


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, "no")
