"""What is at an MLflow tracking URI, looked at without mlflow (which takes seconds to import) and before any work: a
store that mlflow would refuse is refused at once, and not when hours of work are to be recorded."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

from infra.errors import TrackingUnusable
from infra.filesystem.disk import why_unwritable
from infra.secrets import redacted

log = logging.getLogger("slimline")

_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "databricks-uc", "uc", "file", "")
_DRIVERS = {
    "postgresql": "psycopg2",
    "postgresql+psycopg2": "psycopg2",
    "mysql+pymysql": "pymysql",
    "mssql+pyodbc": "pyodbc",
}
#: seconds to wait for a server's answer
_PATIENCE = 3.0


def database_of(uri: str) -> Path | None:
    """The sqlite file that a URI names, if it names one."""
    return Path(uri.removeprefix(_SQLITE).split("?")[0]).absolute() if uri.startswith(_SQLITE) else None


def lock_file(uri: str) -> Path:
    """What the processes of this host take turns by, beside the sqlite file, whose folder is made."""
    database = database_of(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
        return database.with_name(f"{database.name}.lock")
    server = hashlib.sha256(uri.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"slimline-mlflow-{os.getuid()}-{server}.lock"


def tagged_run(database: Path, experiment: str, tags: Mapping[str, str | None]) -> str | None:
    """Id of an active run of the experiment that has all these tags (with any value where it says None); None also
    whenever the sqlite file cannot tell."""
    joins = "".join(
        f" JOIN tags AS t{index} ON t{index}.run_uuid = runs.run_uuid AND t{index}.key = ?"
        + ("" if value is None else f" AND t{index}.value = ?")
        for index, value in enumerate(tags.values())
    )
    query = f"""
        SELECT runs.run_uuid FROM runs JOIN experiments USING (experiment_id){joins}
        WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'"""
    values = [part for tag in tags.items() for part in tag if part is not None]
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
            row = connection.execute(query, [*values, experiment]).fetchone()
    except sqlite3.Error:
        return None  # perhaps other tables than in mlflow 3.17: mlflow itself will look
    return None if row is None else str(row[0])


def check_store(uri: str) -> None:
    """Raise TrackingUnusable for what mlflow cannot use. A server that does not answer now may do so when there is
    something to record: that is a warning."""
    try:
        scheme = urlsplit(uri).scheme.lower()
    except ValueError as error:
        raise _unusable(uri, f"it is no URI ({error})", "correct SLIMLINE_MLFLOW_URI") from error
    if scheme.partition("+")[0] not in _SCHEMES:
        raise _unusable(uri, f"{scheme}: is none of {', '.join(_SCHEMES[:6])}", "correct SLIMLINE_MLFLOW_URI")
    driver = _DRIVERS.get(scheme)
    if driver is not None and importlib.util.find_spec(driver) is None:
        raise _unusable(uri, f"it needs {driver}, which is not installed", f"pip install {driver}")
    database = database_of(uri)
    if database is not None:
        _check_database(uri, database)
    elif scheme in ("http", "https"):
        _ask_server(uri)


def _check_database(uri: str, path: Path) -> None:
    elsewhere = "set SLIMLINE_MLFLOW_URI to another database"
    if reason := why_unwritable(path.parent):
        raise _unusable(uri, reason, f"make it writable, or {elsewhere}")
    if path.is_dir():
        raise _unusable(uri, f"{path} is a folder", f"remove it, or {elsewhere}")
    if not path.exists():
        return
    if not os.access(path, os.R_OK | os.W_OK):
        raise _unusable(uri, f"{path} cannot be read and written by this user", f"make it so, or {elsewhere}")
    try:
        revisions = _revisions(path)
    except sqlite3.OperationalError:
        return  # locked for now, or in a way of its own: mlflow will see
    except sqlite3.DatabaseError as error:
        raise _unusable(uri, f"{error}", f"restore it from a copy, or {elsewhere}") from error
    known, newest = _known_revisions()
    for revision in revisions if known else ():
        if revision not in known:
            raise _unusable(
                uri, f"its schema {revision} is of a newer mlflow than is installed", f"install that, or {elsewhere}"
            )
        if revision not in newest:
            raise _unusable(
                uri,
                f"its schema {revision} is of an older mlflow",
                f"copy it and run: mlflow db upgrade {redacted(uri)}",
            )


def _revisions(path: Path) -> list[str]:
    """Of the schema; none for a database without mlflow's tables. Raises sqlite3.Error."""
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=1.0)) as connection:
        named = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        return [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")] if named else []


def _known_revisions() -> tuple[set[str], set[str]]:
    """All revisions of which the installed mlflow has a migration, and those that no other follows; none if it has its
    migrations elsewhere than it used to."""
    package = importlib.util.find_spec("mlflow")
    folders = (package.submodule_search_locations if package else None) or []
    known: set[str] = set()
    followed: set[str] = set()
    for file in (found for folder in folders for found in Path(folder, "store/db_migrations/versions").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        known |= set(re.findall(r"^revision\b[^=\n]*=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
        for value in re.findall(r"^down_revision\b[^=\n]*=(.*)$", text, re.MULTILINE):
            followed |= set(re.findall(r"[\"'](\w+)[\"']", value))
    return known, known - followed


def _ask_server(uri: str) -> None:
    parts = urlsplit(uri)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health")
    try:
        urlopen(bare.geturl(), timeout=_PATIENCE).close()
    except HTTPError:
        return  # somebody answers; who may record there is seen when there is something to record
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        log.warning(
            "MLflow at %s does not answer now (%s): what is run will be recorded there at the end, so start it, or "
            "correct SLIMLINE_MLFLOW_URI",
            redacted(uri),
            reason,
        )


def _unusable(uri: str, reason: str, way_out: str) -> TrackingUnusable:
    return TrackingUnusable(f"MLflow at {redacted(uri)} cannot be used: {redacted(reason)}; {way_out}")
