"""Taking a bundle into a store: looked through first, verified as a whole, and only then visible.

A bundle comes from elsewhere: its names are not trusted, and it may have been cut short or changed on its way.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from infra.artifacts.bundle_writer import CONTENTS, ROWS, Contents, HashingReader, Progress, member_name
from infra.artifacts.claims import claimed
from infra.artifacts.manifest import is_inside
from infra.artifacts.store import MANIFEST, ArtifactRef, ArtifactStore, FileEntry
from infra.errors import BundleInvalid
from infra.filesystem.disk import check_free, full_disk_named, sync_folder
from infra.keys import stage_key
from infra.models.trusted_code import NOTE

#: of bundle.json, the one member that is read into memory
_LARGEST_CONTENTS = 2**28
_CHUNK = 2**20
_PICKLED = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was looked through: all that it promises is there, in its full length and under a safe name."""

    path: Path
    contents: Contents
    members: dict[str, tarfile.TarInfo]


@dataclass(frozen=True)
class ImportedBundle:
    """What came in, and what was there already."""

    contents: Contents
    new: tuple[ArtifactRef, ...]


def read_bundle(path: Path) -> Bundle:
    """Read what a bundle promises and check it against its members, without reading them.

    Raises BundleInvalid for what is no bundle, is cut short, or has members that are links, lead out of it, are pickled
    or were not promised.
    """
    with _opened(path) as tar:
        members = list(tar)
        for member in members:
            _check_member(member, path)
        if not members or members[0].name != CONTENTS:
            raise BundleInvalid(
                f"{path} is no bundle: it does not begin with {CONTENTS}; make one with slimline export"
            )
        contents = _contents(tar, members[0], path)
    _check_names(contents, path)
    _check_promises(contents, members, path)
    return Bundle(path, contents, {member.name: member for member in members})


def import_bundle(
    store: ArtifactStore, bundle: Bundle, add_rows: Callable[[Path], object], progress: Progress = lambda size: None
) -> ImportedBundle:
    """Bring the artifacts that the store has not into it, and then the rows. Killed, it goes on when called again.

    Complete artifacts are never replaced. Nothing is visible before every hash was found right. add_rows: takes in the
    parquet file of the run. progress: told bytes as they are done.
    Raises BundleInvalid, DiskFull, ResultsUnusable.
    """
    contents = bundle.contents
    key = stage_key("import", 1, {"contents": contents.model_dump(mode="json")})
    ours = ArtifactRef(kind="report", key=key)
    with store.lock(ours), claimed(store.root, contents.refs, f"import of {contents.run_key}"):
        missing = [manifest for manifest in contents.artifacts if not store.has(manifest.ref)]
        files = {ROWS: contents.rows} | {
            member_name(manifest.ref, name): entry for manifest in missing for name, entry in manifest.files.items()
        }
        work = store.scratch(ours)
        with full_disk_named(store.root):
            _extract(bundle, files, work, progress)
        _check_rows(work / ROWS, bundle)
        for manifest in missing:
            store.adopt(work / member_name(manifest.ref, ""), manifest)
        add_rows(work / ROWS)
        store.drop_scratch(ours)
    return ImportedBundle(contents, tuple(manifest.ref for manifest in missing))


def _extract(bundle: Bundle, files: dict[str, FileEntry], work: Path, progress: Progress) -> None:
    """Copy files of a bundle to `work`. What has its name there is whole and has the right hash, also after a kill."""
    todo = {name: entry for name, entry in files.items() if not (work / name).exists()}
    progress(sum(entry.bytes for name, entry in files.items() if name not in todo))
    check_free(work, sum(entry.bytes for entry in todo.values()))
    changed, part = [], work / ".part"
    with _opened(bundle.path) as tar:
        for name, entry in todo.items():
            source = tar.extractfile(bundle.members[name])
            assert source is not None, "only regular files pass `read_bundle`"
            reader = HashingReader(source, progress)
            with part.open("wb") as file:
                shutil.copyfileobj(reader, file, _CHUNK)
                file.flush()
                os.fsync(file.fileno())
            if reader.hexdigest() != entry.sha256:
                changed.append(name)
                continue
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, work / name)
            sync_folder((work / name).parent)
    if changed:
        raise BundleInvalid(
            f"{bundle.path}: {', '.join(changed)} changed since the export; nothing was taken in, copy the file again"
        )


def _check_rows(rows: Path, bundle: Bundle) -> None:
    from infra.results.files import decode  # pyarrow takes a while

    if (key := decode(rows.read_bytes(), rows).key) != bundle.contents.run_key:
        raise BundleInvalid(f"{bundle.path} is refused: its {ROWS} is of run {key}, not {bundle.contents.run_key}")


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise BundleInvalid(f"{path} is no whole tar file ({error}); copy it again") from error
    except FileNotFoundError as error:
        if path.exists():
            raise
        raise BundleInvalid(f"there is no file {path} to import") from error


def _check_member(member: tarfile.TarInfo, path: Path) -> None:
    """Refuse everything but regular files below the bundle's own root."""
    name = PurePosixPath(member.name)
    try:
        tarfile.data_filter(member, str(path.parent))
    except tarfile.FilterError as error:
        raise BundleInvalid(f"{path} is refused: {error}") from error
    if not is_inside(member.name):
        raise BundleInvalid(f"{path} is refused: its member {member.name!r} leads out of the bundle")
    if member.type not in _REGULAR or member.issparse():
        raise BundleInvalid(f"{path} is refused: its member {member.name!r} is a link or another special file")
    if name.suffix.lower() in _PICKLED:
        raise BundleInvalid(
            f"{path} is refused: its member {member.name!r} may be pickled code; only safetensors are read"
        )
    if name.name == NOTE:
        raise BundleInvalid(
            f"{path} is refused: its member {member.name!r} would have a tokenizer's code run that no spec here has "
            "trusted; run the spec on this machine instead"
        )


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Contents:
    source = tar.extractfile(member)
    if source is None or member.size > _LARGEST_CONTENTS:
        raise BundleInvalid(f"{path} is no bundle: its {CONTENTS} is {member.size} bytes long")
    try:
        return Contents.model_validate_json(source.read())
    except ValidationError as error:
        raise BundleInvalid(
            f"{path}: its {CONTENTS} cannot be read; it is damaged, or of a newer slimline: upgrade or export again"
        ) from error


def _check_names(contents: Contents, path: Path) -> None:
    """Refuse manifests whose file names could lead out of the artifact's folder."""
    if len(set(contents.refs)) < len(contents.refs):
        raise BundleInvalid(f"{path} is refused: it has an artifact twice")
    for manifest in contents.artifacts:
        names = set(manifest.files)
        if not names:
            raise BundleInvalid(f"{path} is refused: {manifest.ref.key} has no files")
        parents = {str(parent) for name in names for parent in PurePosixPath(name).parents}
        for name in names:
            if not is_inside(name):
                raise BundleInvalid(f"{path} is refused: {manifest.ref.key} has a file {name!r} that leads out of it")
            if name == MANIFEST or name in parents:
                raise BundleInvalid(f"{path} is refused: {manifest.ref.key} cannot have a file {name!r}")


def _check_promises(contents: Contents, members: list[tarfile.TarInfo], path: Path) -> None:
    promised = {ROWS: contents.rows.bytes} | {
        member_name(manifest.ref, name): entry.bytes
        for manifest in contents.artifacts
        for name, entry in manifest.files.items()
    }
    length = path.stat().st_size
    twice = [name for name, count in Counter(member.name for member in members).items() if count > 1]
    present = {member.name: member for member in members[1:]}
    if twice or (unasked := sorted(present.keys() - promised.keys())):
        raise BundleInvalid(f"{path} is refused: {(twice or unasked)[0]!r} is in it unasked")
    for name, size in promised.items():
        member = present.get(name)
        if member is None or member.size != size or member.offset_data + size > length:
            raise BundleInvalid(f"{path} is cut short: {name} is not in it whole; copy the file again")
