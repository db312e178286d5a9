"""A store on a file system whose locks stop at this machine is refused, with the mount and the option."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from infra.artifacts.store import ArtifactStore
from infra.errors import StoreUnsafe
from infra.filesystem import mounts
from infra.filesystem.mounts import Mount, check_locks, local_locks, mount_of

TABLE = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 27 0:30 / /data rw,relatime shared:5 - nfs4 host:/export rw,vers=4.2,hard,local_lock=none,addr=10.0.0.1
31 27 0:31 / /old rw,relatime - nfs host:/old rw,vers=3,nolock,local_lock=all
32 27 0:32 / /win rw,relatime - cifs //host/share rw,vers=3.1.1,nobrl
33 27 0:33 / /far rw,nosuid - fuse.sshfs host:/ rw,user_id=0
34 27 0:34 / /data/my\\040disk rw - xfs /dev/sdb rw
35 27 0:35 / /data/hidden rw - xfs /dev/sdc rw
36 27 0:36 / /data/hidden rw - nfs host:/x rw,local_lock=flock
nonsense
"""


@pytest.mark.parametrize(
    ("path", "type_", "problem"),
    [
        ("/var/store", "ext4", ""),
        ("/data/store", "nfs4", ""),
        ("/database", "ext4", ""),
        ("/data/my disk/store", "xfs", ""),
        ("/old/store", "nfs", "nfs mounted with nolock"),
        ("/data/hidden/store", "nfs", "nfs mounted with local_lock=flock"),
        ("/win", "cifs", "cifs mounted with nobrl"),
        ("/far/store", "fuse.sshfs", "is fuse.sshfs"),
    ],
)
def test_the_mount_says_where_locks_end(path: str, type_: str, problem: str) -> None:
    mount = mount_of(Path(path), TABLE)
    assert mount is not None
    assert mount.type == type_
    found = local_locks(mount)
    assert (problem in found) if problem else (found == "")


def test_an_unsafe_store_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"27 1 0:1 / {tmp_path} rw - nfs host:/x rw,vers=3,nolock\n")
    monkeypatch.setattr(mounts, "_MOUNTS", table)
    with pytest.raises(StoreUnsafe, match=rf"lies on {tmp_path}, which is nfs mounted with nolock .*SLIMLINE_REMOTE"):
        ArtifactStore(tmp_path / "store").preflight()


def test_locks_that_do_not_exclude_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_locks(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    with pytest.raises(StoreUnsafe, match="two can hold one lock at a time"):
        check_locks(tmp_path)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreUnsafe):
        check_locks(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_machine_without_a_mount_table_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_MOUNTS", tmp_path / "none")
    check_locks(tmp_path)
    assert mount_of(tmp_path, "") is None
    assert local_locks(Mount(tmp_path, "ext4", ("rw",))) == ""
