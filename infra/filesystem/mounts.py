"""Whether the locks of a folder exclude everybody who shares it: on a network file system that is a mount option.

A local lock looks the same from inside, so the mount table is asked for what is known, and a trial says the rest.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from infra.errors import StoreUnsafe
from infra.filesystem.locks import flocked

_MOUNTS = Path("/proc/self/mountinfo")

_LOCAL_LOCKS = "keeps locks on this machine, so that two machines would write the same artifact"
#: option of a file system (by the beginning of its type) that makes locks local
_LOCAL_OPTIONS = {
    "nfs": ("nolock", "local_lock=flock", "local_lock=all"),
    "cifs": ("nobrl",),
    "smb": ("nobrl",),
    "lustre": ("localflock", "noflock"),
    "gfs2": ("localflocks",),
    "ocfs2": ("localflocks",),
}
#: file systems whose locks never leave the machine, whatever the options
_LOCAL_TYPES = (
    "fuse.sshfs",
    "fuse.s3fs",
    "fuse.gcsfuse",
    "fuse.rclone",
    "fuse.goofys",
    "fuse.mount-s3",
    "fuse.blobfuse",
)
_WAY_OUT = (
    "mount it so that locks are shared, or set SLIMLINE_HOME to a local folder and SLIMLINE_REMOTE to what is shared"
)


@dataclass(frozen=True)
class Mount:
    """One line of the mount table. options: of the mount and of the file system."""

    point: Path
    type: str
    options: tuple[str, ...]


def check_locks(root: Path) -> None:
    """Raise StoreUnsafe if locks in the existing folder `root` do not exclude other machines, or not even us."""
    mount = mount_of(root, _mount_table())
    if mount is not None:
        problem = local_locks(mount)
        if problem:
            raise StoreUnsafe(f"the store {root} lies on {mount.point}, which {problem}; {_WAY_OUT}")
    if not _excludes(root):
        kind = f" ({mount.type} at {mount.point})" if mount else ""
        raise StoreUnsafe(f"two can hold one lock at a time in {root}{kind}; {_WAY_OUT}")


def local_locks(mount: Mount) -> str:
    """What is known to be wrong with the locks of a mount; "" if nothing."""
    if mount.type in _LOCAL_TYPES:
        return f"is {mount.type} and {_LOCAL_LOCKS}"
    for beginning, options in _LOCAL_OPTIONS.items():
        found = [option for option in options if option in mount.options]
        if mount.type.startswith(beginning) and found:
            return f"is {mount.type} mounted with {found[0]} and {_LOCAL_LOCKS}"
    return ""


def mount_of(path: Path, table: str) -> Mount | None:
    """The mount that `path` lies on, by the text of a mountinfo (see proc_pid_mountinfo(5)); the last one wins."""
    real = path.resolve()
    found: Mount | None = None
    for line in table.splitlines():
        mount = _parse(line)
        within = mount is not None and real.is_relative_to(mount.point)
        if mount is not None and within and (found is None or len(mount.point.parts) >= len(found.point.parts)):
            found = mount
    return found


def _parse(line: str) -> Mount | None:
    left, _, right = line.partition(" - ")
    fields, described = left.split(), right.split(" ")
    if len(fields) < 6 or len(described) < 3:
        return None
    point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), fields[4])
    return Mount(Path(point), described[0], (*fields[5].split(","), *described[2].split(",")))


def _mount_table() -> str:
    try:
        return _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # no Linux: the trial must do
        return ""


def _excludes(root: Path) -> bool:
    """Whether a held lock is refused to a second one, and had again once it is free; False where there are no locks."""
    with tempfile.NamedTemporaryFile(dir=root, prefix=".lock-trial-") as file:
        trial = Path(file.name)
        try:
            with flocked(trial, wait=False) as first, flocked(trial, wait=False) as second:
                refused = first and not second
            with flocked(trial, wait=False) as again:
                return refused and again
        except OSError:
            return False
