"""The tables of the index and all SQL that writes them. Only infra/results/index.py imports the library itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from infra.results.files import Record, arrow_table
from infra.results.rows import FORMAT, KINDS, RUN, TABLES, ColumnType, Moment, Row, columns

_DUCKDB: dict[ColumnType, str] = {
    "text": "VARCHAR",
    "json": "JSON",
    "integer": "BIGINT",
    "number": "DOUBLE",
    "flag": "BOOLEAN",
    # UTC without a zone: for times with one DuckDB needs pytz in Python, and shows them in the reader's zone
    "moment": "TIMESTAMP",
}


class Connection(Protocol):
    """What we use of a DuckDB connection."""

    def execute(self, query: str, parameters: object = ...) -> Any:
        """Run one SQL statement; the result has fetchall()."""

    def register(self, name: str, table: object) -> Any:
        """Let an Arrow table be asked under a name."""

    def unregister(self, name: str) -> Any:
        """Take the name back."""


class _FileRow(Row):
    """What the index knows of a file."""

    name: str
    kind: str
    key: str
    stamp: str
    recorded_at: Moment


_INDEX: dict[str, type[Row]] = {**TABLES, "files": _FileRow}

#: of the rows of runs, a row per checkpoint; made with the views, for it takes longest of what they are asked
_DERIVED = "measured"


def make_tables(connection: Connection) -> None:
    """Make all tables anew and empty."""
    # No keys: a run's rows are replaced as a whole.
    for table in (*_INDEX, _DERIVED, "schema_version"):
        connection.execute(f"DROP TABLE IF EXISTS {table}")
    for table, row in _INDEX.items():
        definitions = [
            f"{name} {_DUCKDB[column.type]}{'' if column.nullable else ' NOT NULL'}"
            for name, column in columns(row).items()
        ]
        connection.execute(f"CREATE TABLE {table} ({', '.join(definitions)})")
    connection.execute("CREATE TABLE schema_version (version INTEGER, applied_at TIMESTAMP, views VARCHAR)")
    now = datetime.now(UTC).replace(tzinfo=None)
    connection.execute("INSERT INTO schema_version VALUES (?, ?, NULL)", [FORMAT, now])


def make_views(connection: Connection) -> None:
    """Make all views anew over the tables."""
    connection.execute(_views())
    connection.execute("UPDATE schema_version SET views = ?", [_views_digest()])


def has_views(connection: Connection) -> bool:
    """Whether the views are those of this slimline."""
    return connection.execute("SELECT views FROM schema_version").fetchall() == [(_views_digest(),)]  # type: ignore[no-any-return]


@cache
def _views() -> str:
    folder = Path(__file__).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("views.sql", "published.sql"))


def _views_digest() -> str:
    return hashlib.sha256(_views().encode()).hexdigest()


def stamps(connection: Connection) -> dict[str, str]:
    """The stamps of the files that the index has taken in, by name."""
    return dict(connection.execute("SELECT name, stamp FROM files").fetchall())


def delete_files(connection: Connection, names: Sequence[str]) -> None:
    """Delete all that came from the named files."""
    if not names:
        return
    for kind in KINDS:
        for table in kind.tables:
            connection.execute(
                f"DELETE FROM {table} WHERE {kind.key} IN "
                f"(SELECT key FROM files WHERE kind = '{kind.name}' AND name IN (SELECT unnest(?)))",
                [list(names)],
            )
    connection.execute(f"DELETE FROM {_DERIVED} WHERE run_key NOT IN (SELECT run_key FROM runs)")
    connection.execute("DELETE FROM files WHERE name IN (SELECT unnest(?))", [list(names)])


def insert(connection: Connection, records: Sequence[tuple[str, Record]], stamps: Mapping[str, str]) -> None:
    """Take in what was read from files, in this order. `stamps`: what the files had before they were read, by name."""
    rows: dict[str, list[Row]] = {table: [] for table in _INDEX}
    for name, record in records:
        for table, new in record.rows.items():
            rows[table] += new
        file = {"name": name, "kind": record.kind.name, "key": record.key, "stamp": stamps[name]}
        rows["files"].append(_FileRow(**file, recorded_at=record.recorded_at))
    for table, new in rows.items():
        if new:
            connection.register("fresh", arrow_table(_INDEX[table], new))
            connection.execute(f"INSERT INTO {table} SELECT * FROM fresh")
            connection.unregister("fresh")
    if keys := [record.key for _, record in records if record.kind is RUN]:
        connection.execute(f"INSERT INTO {_DERIVED} SELECT * FROM {_DERIVED}_of(?)", [keys])


def in_utc(value: object) -> object:
    """A value of a column as that of a field: all times in the index are UTC."""
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) else value
