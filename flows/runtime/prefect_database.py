"""Checks the database of Prefect's server before a server is started on it, which would fail after minutes of silence
or not say why. Which databases this Prefect can use is read from its own migrations."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

from flows.errors import PrefectUnusable
from infra.filesystem.disk import why_unwritable
from infra.secrets import redacted

log = logging.getLogger("slimline")

_VARIABLE = "PREFECT_API_DATABASE_CONNECTION_URL"
_ELSEWHERE = f"set PREFECT_HOME or {_VARIABLE} to another place"
#: bytes that a new database and its journal take at first
_ROOM = 8 * 2**20
#: seconds after which a lock is reported
_SOON = 2.0
_DRIVERS = {"postgresql+asyncpg": "asyncpg", "sqlite+aiosqlite": "aiosqlite"}
_PORTS = {"postgresql": 5432}


def check_database(patience: float = 60.0) -> str:
    """Where Prefect's server would keep its records, in words. Raises PrefectUnusable for what it could not use.

    patience: seconds to wait for one who has the file locked; a server waits for a minute.
    """
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    url = str(PREFECT_API_DATABASE_CONNECTION_URL.value())
    scheme, marker, rest = url.partition("://")
    if not marker or scheme not in _DRIVERS:
        raise PrefectUnusable(
            f"{_VARIABLE} {redacted(url)!r} names no database that Prefect can use; it begins with "
            f"{' or '.join(f'{name}://' for name in _DRIVERS)}"
        )
    if importlib.util.find_spec(_DRIVERS[scheme]) is None:
        raise PrefectUnusable(f"Prefect's database {redacted(url)} needs {_DRIVERS[scheme]}; pip install it")
    if not scheme.startswith("sqlite"):
        return _check_reachable(url)
    path = rest.partition("?")[0].removeprefix("/")
    if path in ("", ":memory:") or path.startswith("file:"):
        return "in memory"
    return _check_file(Path(path).absolute(), patience)


def _check_file(path: Path, patience: float) -> str:
    where = f"Prefect's database {path}"
    _check_folder(path.parent, where)
    if path.is_dir():
        raise PrefectUnusable(f"{where} is a folder; remove it, or {_ELSEWHERE}")
    if not path.exists() or path.stat().st_size == 0:
        return f"{path}, which the first run makes"
    if not os.access(path, os.R_OK | os.W_OK):
        raise PrefectUnusable(f"{where} cannot be read and written by this user; make it writable, or {_ELSEWHERE}")
    try:
        revisions = _revisions(path, patience)
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise PrefectUnusable(f"{where} cannot be opened ({error}); {_ELSEWHERE}") from error
        raise PrefectUnusable(
            f"{where} has been locked by another program for {patience:.0f} s; end that (a browser of databases, a "
            f"backup, a server that hangs), or {_ELSEWHERE}"
        ) from error
    except sqlite3.DatabaseError as error:
        raise PrefectUnusable(
            f"{where} is damaged or no database ({error}); move it away and a new one is made (runs of slimline lose "
            f"nothing by it but their pages), or {_ELSEWHERE}"
        ) from error
    for revision in revisions:
        _check_revision(revision, where)
    return str(path)


def _revisions(path: Path, patience: float) -> list[str]:
    """Of the migrations that made the database; none for one without tables. Raises sqlite3.Error."""
    uri = f"file:{quote(str(path))}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=min(_SOON, patience), isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")  # as a server does; nothing is written
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or patience <= _SOON:
                raise
            log.info("waiting for Prefect's database %s, which another program has locked", path)
            connection.execute(f"PRAGMA busy_timeout = {1000 * (patience - _SOON):.0f}")
            connection.execute("BEGIN IMMEDIATE")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" not in tables:
            if tables:
                raise sqlite3.DatabaseError(f"it has tables, such as {min(tables)}, but none of Prefect's")
            return []
        return [str(revision) for (revision,) in connection.execute("SELECT version_num FROM alembic_version")]


def _check_revision(revision: str, where: str) -> None:
    import prefect

    known = list(_known_revisions(Path(str(prefect.__file__)).parent, "sqlite"))
    if known and revision not in known:
        raise PrefectUnusable(
            f"{where} is of revision {revision}, which Prefect {prefect.__version__} does not know: a newer Prefect "
            f"has used it; install that one, or {_ELSEWHERE}"
        )


def _known_revisions(package: Path, dialect: str) -> Iterator[str]:
    """Of every migration that this Prefect ships; none if it ships them elsewhere than it used to."""
    for file in (package / "server/database/_migrations/versions" / dialect).glob("*.py"):
        yield from re.findall(r"^revision\b[^=\n]*=\s*[\"'](\w+)[\"']", file.read_text(encoding="utf-8"), re.MULTILINE)


def _check_folder(folder: Path, where: str) -> None:
    """A folder that is or can be made, can be written in and has room."""
    if reason := why_unwritable(folder):
        raise PrefectUnusable(f"{where}: {reason}; make it so, or {_ELSEWHERE}")
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    # Prefect makes the last folder of its home, and no other
    if len(folder.relative_to(existing).parts) > 1:
        raise PrefectUnusable(f"{where} cannot be made: there is no folder {folder.parent}; make it, or {_ELSEWHERE}")
    free = shutil.disk_usage(existing).free
    if free < _ROOM:
        raise PrefectUnusable(
            f"{where}: the disk of {existing} has {free / 2**20:.1f} MiB free and a server needs "
            f"{_ROOM / 2**20:.0f} MiB; make room, or {_ELSEWHERE}"
        )


def _check_reachable(url: str) -> str:
    """Whether anything listens at the address of a database server; whether it lets us in is seen when it is used."""
    parts = urlsplit(url)
    try:
        address = (parts.hostname or "localhost", parts.port or _PORTS[parts.scheme.partition("+")[0]])
        socket.create_connection(address, timeout=5.0).close()
    except (OSError, ValueError) as error:
        raise PrefectUnusable(
            f"Prefect's database {redacted(url)} does not answer ({getattr(error, 'strerror', None) or error}); start "
            f"it, or mend or unset {_VARIABLE}"
        ) from error
    return redacted(url)
