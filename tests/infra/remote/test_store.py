"""Artifacts shared through an object store: complete or absent there too, locked there, and never worth a stage."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.artifacts.manifest import Manifest
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import RemoteUnusable, SettingsInvalid
from infra.remote.files import RemoteFiles, open_files
from infra.remote.locks import LockTiming, remotely_locked
from infra.remote.store import RemoteStore
from tests.infra.processes import kill_after_line, start

REF = ArtifactRef(kind="checkpoint", key="prune-slimgpt-v1-0123456789abcdef")
QUICK = LockTiming(renew=0.05, expire=0.5, look=0.02)
_HOLDER = """
import sys, time
from infra.remote.files import open_files
from infra.remote.locks import LockTiming, remotely_locked
with remotely_locked(open_files(sys.argv[1]), ".locks/x", LockTiming(renew=0.05, expire=0.5, look=0.02)):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def files(tmp_path: Path) -> RemoteFiles:
    return open_files(f"file://{tmp_path}/bucket")


@pytest.fixture
def remote(files: RemoteFiles) -> RemoteStore:
    return RemoteStore(files, QUICK)


def filled(root: Path) -> ArtifactStore:
    store = ArtifactStore(root)
    with store.writing(REF, request={"sparsity": 0.2}, versions={"torch": "2"}) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "deep").mkdir()
        (folder / "deep" / "model.safetensors").write_bytes(bytes(5000))
    return store


def entry_of(tmp_path: Path) -> Path:
    return tmp_path / "bucket" / REF.kind / REF.key / "entry.json"


def test_what_one_shares_another_fetches(remote: RemoteStore, tmp_path: Path) -> None:
    here, there = filled(tmp_path / "here"), ArtifactStore(tmp_path / "there")
    assert not remote.fetch(REF, there)
    remote.share(REF, here)
    assert remote.fetch(REF, there)
    assert there.manifest(REF) == here.manifest(REF)
    assert there.verify(REF) == []
    assert not list((there.root / ".writing").iterdir())


def test_it_is_shared_once_unless_it_is_replaced(remote: RemoteStore, tmp_path: Path) -> None:
    store = filled(tmp_path / "here")
    remote.share(REF, store)
    entry = entry_of(tmp_path).read_bytes()
    remote.share(REF, store)
    assert entry_of(tmp_path).read_bytes() == entry
    remote.share(REF, store, replace=True)
    assert entry_of(tmp_path).read_bytes() != entry
    assert remote.fetch(REF, ArtifactStore(tmp_path / "there"))


@pytest.mark.parametrize("damage", ["changed", "truncated", "deleted", "entry", "outside", "other"])
def test_a_broken_one_is_absent_with_a_warning(
    damage: str, remote: RemoteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, there = filled(tmp_path / "here"), ArtifactStore(tmp_path / "there")
    remote.share(REF, store)
    (weights,) = entry_of(tmp_path).parent.rglob("model.safetensors")
    entry = entry_of(tmp_path)
    if damage == "changed":
        weights.write_bytes(b"1" + bytes(4999))
    elif damage == "truncated":
        weights.write_bytes(bytes(10))
    elif damage == "deleted":
        weights.unlink()
    elif damage == "entry":
        entry.write_bytes(entry.read_bytes()[:50])
    else:
        old, new = ("deep/model", "../../model") if damage == "outside" else (REF.key, "prune-slimgpt-v1-0")
        entry.write_text(entry.read_text().replace(old, new))
    with caplog.at_level(logging.WARNING):
        assert not remote.fetch(REF, there)
    assert "could not be fetched" in caplog.text
    assert not there.has(REF)
    assert not list((there.root / ".writing").glob("*"))
    remote.share(REF, store, replace=True)
    assert remote.fetch(REF, there)


def test_uploads_of_the_dead_are_removed_after_a_day(remote: RemoteStore, tmp_path: Path) -> None:
    home = entry_of(tmp_path).parent
    old, young = home / "20200101T000000-dead", home / "29990101T000000-busy"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    remote.share(REF, filled(tmp_path / "here"))
    assert not old.exists()
    assert young.exists()


def test_an_object_store_that_fails_costs_warnings_only(
    remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(*arguments: object, **named: object) -> None:
        raise ConnectionError("gone")

    store = filled(tmp_path / "here")
    for name in ("read", "write", "create", "upload", "download"):
        monkeypatch.setattr(RemoteFiles, name, gone)
    with remote.lock(REF):
        assert not remote.fetch(REF, ArtifactStore(tmp_path / "there"))
        remote.share(REF, store)
    assert [word in caplog.text for word in ("locked", "fetched", "shared")] == [True] * 3
    monkeypatch.undo()
    remote.share(REF, store)
    assert remote.fetch(REF, ArtifactStore(tmp_path / "there"))


def test_one_holds_the_lock_at_a_time(files: RemoteFiles) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with remotely_locked(files, ".locks/x", QUICK):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work) for _ in range(8)]:
            done.result(timeout=30)
    assert most == 1
    assert files.names(".locks") == []


def test_a_renewed_lock_is_not_taken_however_long_it_is_held(files: RemoteFiles) -> None:
    with ThreadPoolExecutor(1) as thread:
        with remotely_locked(files, ".locks/x", QUICK):
            waiting = thread.submit(lambda: remotely_locked(files, ".locks/x", QUICK).__enter__())
            time.sleep(3 * QUICK.expire)
            assert not waiting.done()
        waiting.result(timeout=5)


def test_the_lock_of_a_killed_holder_expires(files: RemoteFiles, caplog: pytest.LogCaptureFixture) -> None:
    assert kill_after_line(start(_HOLDER, files.url)) == "held"
    started = time.monotonic()
    with remotely_locked(files, ".locks/x", QUICK):
        assert QUICK.expire < time.monotonic() - started < 10
    assert "was not renewed: taken from it" in caplog.text


def test_a_holder_whose_lock_was_taken_leaves_it_alone(files: RemoteFiles, caplog: pytest.LogCaptureFixture) -> None:
    with remotely_locked(files, ".locks/x", QUICK):
        files.write(".locks/x", b'{"holder": "another"}')
        time.sleep(4 * QUICK.renew)
    assert files.read(".locks/x") == b'{"holder": "another"}'
    assert "made twice" in caplog.text


def test_what_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsInvalid, match="credentials") as caught:
        open_files("s3://key:hunter2@bucket/prefix")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SettingsInvalid, match="locks are not known to work on sftp"):
        open_files("sftp://host/x")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(SettingsInvalid, match=r"pip install 'slimline\[gcs\]'"):
            open_files("gs://bucket/prefix")
    (tmp_path / "file").touch()
    with pytest.raises(RemoteUnusable, match="cannot be written"):
        open_files(f"file://{tmp_path}/file/x").check()


def test_a_server_that_overwrites_is_refused(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check()
    monkeypatch.setattr(RemoteFiles, "create", lambda self, path, content: self.write(path, content) or True)
    with pytest.raises(RemoteUnusable, match="does not refuse to create a file that is there"):
        files.check()


def test_memory_is_a_file_system_too(tmp_path: Path) -> None:
    files = open_files("memory://bucket/prefix")
    files.check()
    remote = RemoteStore(files, QUICK)
    remote.share(REF, filled(tmp_path / "here"))
    there = ArtifactStore(tmp_path / "there")
    with remote.lock(REF):
        assert remote.fetch(REF, there)
    assert isinstance(there.manifest(REF), Manifest)
