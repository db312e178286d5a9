"""The truth about all results: one parquet file per run and per night, put in its place as a whole.

Writers need no lock and never meet: any number of processes on any number of machines can write into one folder. A file
has one row: `format`, `recorded_at`, the run as a struct, a list of structs for each further table, and their `digest`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.errors import ResultsUnusable
from infra.filesystem.disk import full_disk_named, sync_folder, write_durably
from infra.log_once import warn_once
from infra.results.older_formats import with_checkpoints
from infra.results.rows import FORMAT, KINDS, RUN, ColumnType, Kind, Row, columns

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# File systems allow names of 255 bytes, specs names of any length.
_LONGEST_NAME = 200
_UNFINISHED = ".writing"
_UNFINISHED_SECONDS = 86400.0
_WAY_OUT = "make it writable or set SLIMLINE_RESULTS_FOLDER to another folder"

_ARROW: dict[ColumnType, pa.DataType] = {
    "text": pa.string(),
    "json": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "moment": pa.timestamp("us", tz="UTC"),
}


class _NewerFormat(ResultsUnusable):
    """The file of a newer slimline."""


@dataclass(frozen=True)
class Record:
    """What one file holds: all rows of a run or of a night, by table."""

    kind: Kind
    rows: Mapping[str, Sequence[Row]]
    recorded_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def key(self) -> str:
        """The run key or the night's id."""
        return str(getattr(self.rows[self.kind.head][0], self.kind.key))

    def is_of_one(self) -> bool:
        """Whether every row has the key of the first."""
        return all(getattr(row, self.kind.key) == self.key for table in self.rows.values() for row in table)


class ResultFiles:
    """The files in `folder`, which is made on the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._problems: dict[tuple[str, str], str] = {}

    def path(self, kind: Kind, key: str) -> Path:
        """Where the file of a run or night is or would be. Raises ResultsUnusable if the key cannot be a name."""
        if not _KEY.fullmatch(key):
            raise ResultsUnusable(f"{key!r} cannot be the key of a {kind.name}: letters, digits and . _ + - only")
        return self.folder / kind.head / _file_name(key)

    def write(self, record: Record) -> None:
        """Put a file in its place, over an older one. Raises DiskFull or ResultsUnusable, having changed nothing."""
        self._put(self.path(record.kind, record.key), encode(record))

    def add(self, path: Path) -> str:
        """Copy a file of another store in; returns its key. What was recorded here under that key later is kept.

        Raises ResultsUnusable if it is no results file that we can read, and what `write` raises.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ResultsUnusable(f"{path} cannot be read ({error.strerror}); export the run again") from error
        record = decode(content, path)
        target = self.path(record.kind, record.key)
        if not _is_newer(target, record):
            self._put(target, content)
        return record.key

    def listing(self) -> dict[str, str]:
        """The readable files: a stamp by the name below `folder`. A file that was written anew has another stamp.

        The stamp does not trust dates, which a copy may keep: a new file has an inode of its own while the one that it
        replaces exists, and one that is written over has another ctime.
        """
        return dict(file for file in self._stamps() if file not in self._problems)

    def read(self, listing: Mapping[str, str]) -> Iterator[tuple[str, Record]]:
        """The records of listed files. One that cannot be read is named in a warning and left out from now on."""
        for name, stamp in listing.items():
            try:
                yield name, read(self.folder / name)
            except FileNotFoundError:
                continue
            except ResultsUnusable as error:
                self._problems[name, stamp] = str(error)
                warn_once(f"{error}; the other results are complete")

    def problems(self) -> tuple[str, ...]:
        """A sentence for each file that could not be read, and is still the same."""
        return tuple(self._problems[file] for file in self._stamps() if file in self._problems)

    def check_writable(self) -> None:
        """Create the folder if needed and write in it. Raises ResultsUnusable or DiskFull."""
        with self._trouble_named():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"slimline")
                probe.flush()

    def _stamps(self) -> Iterator[tuple[str, str]]:
        for kind in KINDS:
            for entry in self._entries(self.folder / kind.head):
                with suppress(FileNotFoundError):
                    state = entry.stat()
                    times = f"{state.st_mtime_ns}-{state.st_ctime_ns}"
                    yield f"{kind.head}/{entry.name}", f"{state.st_size}-{times}-{state.st_ino}"

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from (entry for entry in entries if entry.name.endswith(".parquet"))
        except FileNotFoundError:
            return
        except OSError as error:
            raise ResultsUnusable(f"the results in {folder} cannot be read ({error.strerror}); {_WAY_OUT}") from error

    def _put(self, path: Path, content: bytes) -> None:
        with self._trouble_named():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(path.parent)
            unfinished = path.parent / f"{uuid.uuid4().hex}{_UNFINISHED}"
            try:
                write_durably(unfinished, content)
                os.replace(unfinished, path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)

    def _sweep(self, folder: Path) -> None:
        """Remove what killed writers left. Theirs are seconds old while they live; other names are not ours."""
        for path in folder.glob(f"{'[0-9a-f]' * 32}{_UNFINISHED}"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _UNFINISHED_SECONDS:
                    path.unlink()

    @contextmanager
    def _trouble_named(self) -> Iterator[None]:
        try:
            with full_disk_named(self.folder):
                yield
        except OSError as error:
            reason = error.strerror or error
            raise ResultsUnusable(f"results cannot be written in {self.folder} ({reason}); {_WAY_OUT}") from error


def encode(record: Record) -> bytes:
    """The content of a record's file."""
    assert record.is_of_one(), "rows of another run"
    rows: dict[str, Any] = {
        table: [row.model_dump() for row in record.rows.get(table, ())] for table in record.kind.tables
    }
    (head,) = rows.pop(record.kind.head)
    values = {"format": FORMAT, "recorded_at": record.recorded_at, record.kind.name: head, **rows}
    table = pa.Table.from_pylist([values], schema=_file_schema(record.kind))
    digest = pa.array([_digest(table.to_pylist()[0])])
    sink = pa.BufferOutputStream()
    pq.write_table(table.append_column("digest", digest), sink)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read(path: Path) -> Record:
    """The record in a file of the store. Raises ResultsUnusable, and FileNotFoundError if the file is gone."""
    try:
        record = decode(path.read_bytes(), path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ResultsUnusable(f"{path} cannot be read ({error.strerror}); make it readable") from error
    if (path.parent.name, path.name) != (record.kind.head, _file_name(record.key)):
        raise ResultsUnusable(f"{path} holds {record.kind.name} {record.key}; give the file its old name back")
    return record


def _file_name(key: str) -> str:
    short = key if len(key) <= _LONGEST_NAME else f"{key[:100]}-{hashlib.sha256(key.encode()).hexdigest()}"
    return f"{short}.parquet"


def _is_newer(path: Path, record: Record) -> bool:
    """Whether the file at `path` is to be kept: it is not damaged, and was not recorded before `record`."""
    try:
        return read(path).recorded_at >= record.recorded_at
    except _NewerFormat:
        return True
    except (FileNotFoundError, ResultsUnusable):
        return False


def decode(content: bytes, path: Path) -> Record:
    """The record in the content of a file. Raises ResultsUnusable with the `path` in its sentence."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        version = file.read(["format"]).column("format").to_pylist()[0]
        if version > FORMAT:
            raise _NewerFormat(
                f"{path} was written by a newer slimline (format {version}, this one knows {FORMAT}); upgrade slimline"
            )
        (values,) = file.read().to_pylist()
        if values.pop("digest") != _digest(values):
            raise ValueError("its digest is another one")
        return _record(values)
    except ResultsUnusable:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = "a row is not as expected" if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise ResultsUnusable(
            f"{path} is not a results file or is damaged ({reason}); restore it or move it away and run that spec again"
        ) from error


def arrow_table(row: type[Row], rows: Sequence[Row]) -> pa.Table:
    """Rows as a table; times are UTC and have no zone."""
    table = pa.Table.from_pylist([entry.model_dump() for entry in rows], schema=pa.schema(_fields(row)))
    for index, column in enumerate(table.schema):
        if pa.types.is_timestamp(column.type):
            table = table.set_column(index, column.name, table.column(index).cast(pa.timestamp("us")))
    return table


def _record(values: dict[str, Any]) -> Record:
    (kind,) = (kind for kind in KINDS if kind.name in values)
    stored = {**values, kind.head: [values[kind.name]]}
    rows = {
        table: tuple(row.model_validate(fields) for fields in stored.get(table) or ())
        for table, row in kind.tables.items()
    }
    if kind is RUN and values["format"] < 6:
        rows = with_checkpoints(rows)
    record = Record(kind, rows, values["recorded_at"])
    if not record.is_of_one():
        raise ValueError("it has rows of several keys")
    return record


def _digest(values: dict[str, Any]) -> str:
    """sha256 over all values as they come out of a file: parquet's own checksums leave out its headers."""
    return hashlib.sha256(json.dumps(values, default=datetime.isoformat).encode()).hexdigest()


def _file_schema(kind: Kind) -> pa.Schema:
    lists = {table: pa.list_(pa.struct(_fields(row))) for table, row in kind.tables.items() if table != kind.head}
    return pa.schema(
        [
            pa.field("format", pa.int32(), nullable=False),
            pa.field("recorded_at", _ARROW["moment"], nullable=False),
            pa.field(kind.name, pa.struct(_fields(kind.tables[kind.head])), nullable=False),
            *(pa.field(table, type_, nullable=False) for table, type_ in lists.items()),
        ]
    )


def _fields(row: type[Row]) -> list[pa.Field]:
    return [pa.field(name, _ARROW[column.type], column.nullable) for name, column in columns(row).items()]
