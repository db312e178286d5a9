"""The file system behind SLIMLINE_REMOTE: opened by its URL, and files that are created only where there is none."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from infra.errors import RemoteUnusable, SettingsInvalid

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: protocols whose servers (or kernel) refuse a second creation in one step; the trial of `check` catches what claims to
_EXCLUSIVE = ("file", "local", "memory", "s3", "s3a", "gs", "gcs")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


@dataclass(frozen=True)
class RemoteFiles:
    """A folder of an object store. Paths are relative to it, with slashes."""

    files: AbstractFileSystem
    root: str
    url: str

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine's file systems."""
        return "file" in _protocols(self.files)

    def read(self, path: str) -> bytes | None:
        """Content of a small file as it is now, or None if there is none."""
        self.files.invalidate_cache()
        try:
            return cast(bytes, self.files.cat_file(self._at(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """Write or replace a small file in one step."""
        at = self._at(path)
        if not self.local:
            self.files.pipe_file(at, content)
            return
        aside = self._local(path).with_name(f"{Path(at).name}.{secrets.token_hex(6)}")
        aside.write_bytes(content)  # a reader of a plain file could see half of it
        aside.replace(at)

    def create(self, path: str, content: bytes) -> bool:
        """Write a file if there is none, in one step of the server; whether it was us."""
        try:
            if self.local:  # fsspec's own way looks first and writes then
                with self._local(path).open("xb") as file:
                    file.write(content)
            else:
                self.files.pipe_file(self._at(path), content, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if _refused(error):
                return False
            raise
        return True

    def upload(self, source: Path, path: str) -> None:
        """Write a file of any size, without reading it whole into memory; not in one step, unlike `write`."""
        if self.local:
            self._local(path)
        self.files.put_file(str(source), self._at(path))

    def download(self, path: str, target: Path) -> None:
        """Read a file of any size; raises FileNotFoundError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.files.get_file(self._at(path), str(target))

    def remove(self, path: str) -> None:
        """Remove a file or a folder, if it is there."""
        try:
            self.files.rm(self._at(path), recursive=True)
        except FileNotFoundError:
            return

    def names(self, path: str) -> list[str]:
        """Names in a folder, which need not be there."""
        self.files.invalidate_cache()
        try:
            found: list[Any] = self.files.ls(self._at(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def check(self) -> None:
        """Raise RemoteUnusable if it cannot be written, or if a second creation of a file is not refused."""
        trial = f".trial-{secrets.token_hex(6)}"
        try:
            first, second = self.create(trial, b"1"), self.create(trial, b"2")
            self.remove(trial)
        except Exception as error:  # every driver has its own
            raise RemoteUnusable(
                f"SLIMLINE_REMOTE={self.url} cannot be written ({str(error) or type(error).__name__}); check the "
                "bucket, its rights and the credentials in their usual place, or unset it"
            ) from error
        if (first, second) != (True, False):
            raise RemoteUnusable(
                f"SLIMLINE_REMOTE={self.url}: its {_protocols(self.files)[0]} server does not refuse to create a file "
                "that is there (conditional writes), so locks do not work on it; use another one or unset it"
            )

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _local(self, path: str) -> Path:
        at = Path(self._at(path))
        at.parent.mkdir(parents=True, exist_ok=True)  # object stores have no folders
        return at


def open_files(url: str) -> RemoteFiles:
    """Open a URL. Raises SettingsInvalid for one with credentials in it, of no use, or whose driver is missing."""
    parts = urlsplit(url)
    if parts.password or parts.username or parts.query:
        raise SettingsInvalid(
            f"SLIMLINE_REMOTE={parts.scheme}://... has credentials or options in it, which would end up in logs; "
            "give the plain URL and put them where the driver looks (environment, ~/.aws, gcloud)"
        )
    if parts.scheme not in _EXCLUSIVE:
        raise SettingsInvalid(
            f"SLIMLINE_REMOTE={url}: locks are not known to work on {parts.scheme or 'a path without a protocol'}; "
            f"use one of {', '.join(f'{name}://' for name in _EXCLUSIVE)}"
        )
    import fsspec  # only where there is a remote store

    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SettingsInvalid(
            f"SLIMLINE_REMOTE={url} needs a driver that is not installed; "
            f"`pip install 'slimline[{_EXTRAS.get(parts.scheme, 's3')}]'`"
        ) from error
    return RemoteFiles(files, root.rstrip("/"), url)


def _protocols(files: AbstractFileSystem) -> tuple[str, ...]:
    protocol = files.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _refused(error: BaseException | None) -> bool:
    """Whether the server's answer was "there is one already", or "somebody is creating it": drivers differ."""
    while error is not None:
        words = f"{type(error).__name__} {error}"
        if any(
            word in words for word in ("PreconditionFailed", "ConditionalRequestConflict", "412", "conditionNotMet")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
