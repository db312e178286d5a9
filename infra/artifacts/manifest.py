"""What an artifact is on the disk: its reference, its files with sizes and hashes, and the manifest that says so."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from infra.filesystem.disk import digest, sync_folder

Kind = Literal["checkpoint", "calibration", "statistics", "report", "export"]

MANIFEST = "manifest.json"


class ArtifactRef(BaseModel):
    """The only handle that tasks pass on. It has no path in it: the store knows the root."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    key: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=200)


class FileEntry(BaseModel):
    """Size in bytes and sha256 (hex) of one file of an artifact."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, what it was made from and which files it has (by path relative to its folder)."""

    # Unknown fields are ignored: an older slimline must not throw away what a newer one took hours to make.
    model_config = ConfigDict(frozen=True)
    ref: ArtifactRef
    created_at: AwareDatetime
    seconds: float
    files: dict[str, FileEntry]
    request: dict[str, JsonValue]
    versions: dict[str, str]


def is_inside(name: str) -> bool:
    """Whether the name of a file, which may have come from elsewhere, stays in its artifact's folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and name == "/".join(parts) and ".." not in parts and "\\" not in name


def seal(folder: Path) -> dict[str, FileEntry]:
    """Hash every file of a finished folder and force it to the disk."""
    entries = {}
    for name, path in files_below(folder):
        assert name != MANIFEST, f"{MANIFEST} is the store's own file"
        assert not path.is_symlink(), f"{name} is a link: an artifact must own its bytes"
        entries[name] = FileEntry(bytes=path.stat().st_size, sha256=digest(path, sync=True))
    assert entries, "an artifact without files"
    sync_folders(folder)
    return entries


def sync_folders(folder: Path) -> None:
    """Force the names in `folder` and in all folders inside to the disk."""
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)


def files_below(folder: Path) -> list[tuple[str, Path]]:
    """(path relative to `folder`, path) of every file inside, sorted."""
    found = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted((path.relative_to(folder).as_posix(), path) for path in found)


def first_difference(folder: Path, manifest: Manifest, ref: ArtifactRef) -> str:
    """What is wrong with a folder as the artifact `ref`, judged by names and sizes; "" if nothing."""
    if manifest.ref != ref:
        return f"its manifest belongs to {manifest.ref.kind} {manifest.ref.key}"
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} has {size} bytes instead of {entry.bytes}"
    return ""
