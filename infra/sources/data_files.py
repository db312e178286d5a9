"""The files of a data set one by one: which of them cannot be read and why, and what the wanted columns hold.

`datasets` puts all files of a split into one table, by the types of the first file. Where another does not fit, in
whatever column, it says little more than that there was an error. Here each file is read by its own types, so that a
file can be named, and so that columns which nobody asked for do no harm. `datasets` itself is not imported: how a file
becomes tables is given.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import InfraError, SourceInvalid, SourceUnreadable
from infra.log_once import warn_once
from infra.registry import did_you_mean

MOST_FILES = 100
"""So many files the early look opens, each as far as its first piece: ten megabytes of JSON, 10,000 rows of CSV or of
parquet; where there are more than a few files less of each, down to a tenth. It takes seconds, however large the data
set is."""

_LOOKED_THROUGH = 64 * 2**20
"""Bytes of a damaged file in which the broken line is searched."""

_SHORT = 80
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class DataFiles:
    """The files of one split. Reading starts when the tables of a file are asked for.

    repo_id: the data set as the user calls it. names: as `tables` knows them. tables: a file piece by piece, each with
    its own types. label: a file's name as the user knows it. absent_is_empty: a column may be missing from a whole file
    (a key without a value need not be written in JSON). cast: raises if a table does not go into an earlier schema.
    """

    repo_id: str
    names: tuple[str, ...]
    tables: Callable[[str], Iterator[pa.Table]]
    label: Callable[[str], str]
    absent_is_empty: bool
    cast: Callable[[pa.Table, pa.Schema], object]

    def check(self, columns: Sequence[str] | None) -> bool:
        """Look at the first piece of each of the first MOST_FILES files; whether there is any text in it.

        columns: those that will be read, which must hold text; None: all will be, as one table, of whatever type.
        Raises SourceUnreadable, naming the file, for what cannot be read, does not fit to an earlier file or holds no
        row; SourceInvalid, naming file and row, for a column that is not there or not text.
        """
        seen = _Seen(self, columns or ())
        first: tuple[str, pa.Schema] | None = None
        for name in self.names[:MOST_FILES]:
            for row, table in self.pieces(name):
                seen.add(name, row, table)
                if columns is None:
                    first = first or (name, table.schema)
                    self._check_fit(name, table, *first)
                break
        seen.finish()
        return seen.text

    def read(self, columns: Sequence[str]) -> dict[str, list[str | None]]:
        """These columns of all files, in order. Raises as `check` does."""
        seen = _Seen(self, columns, values={column: [] for column in columns})
        for name in self.names:
            for row, table in self.pieces(name):
                seen.add(name, row, table)
        seen.finish()
        assert seen.values is not None
        return seen.values

    def place_of(self, row: int) -> str:
        """The file that has this row of the split, and its number there, in words."""
        left = row
        for name in self.names:
            length = sum(len(table) for _, table in self.pieces(name))
            if left < length:
                return f"row {left} of {self.label(name)}"
            left -= length
        return f"row {row}"

    def pieces(self, name: str) -> Iterator[tuple[int, pa.Table]]:
        """One file in tables with rows, each with the number of its first row in the file. Raises SourceUnreadable."""
        row = 0
        try:
            if not _is_empty(name):
                for table in self.tables(name):
                    if len(table):
                        table.validate(full=True)  # UTF-8, which readers of JSON do not look at
                        yield row, table
                    row += len(table)
        except (InfraError, ConnectionError, MemoryError):
            raise
        except Exception as error:  # as many types as there are formats, compressions and file systems
            raise SourceUnreadable(
                f"{self.label(name)} cannot be read: {_broken_line(name) or reason(error)}; mend it or fetch it again"
            ) from error

    def _check_fit(self, name: str, table: pa.Table, first: str, schema: pa.Schema) -> None:
        try:
            self.cast(table, schema)
        except Exception as error:
            raise SourceUnreadable(
                f"{self.label(name)} does not fit to {self.label(first)}: "
                f"{_clash(table.schema, schema) or reason(error)}; give all files of a split the same columns and types"
            ) from error


class _Seen:
    """What the wanted columns of the files hold, collected (`values`) or only looked at."""

    def __init__(
        self, files: DataFiles, columns: Sequence[str], values: dict[str, list[str | None]] | None = None
    ) -> None:
        self.values = values
        self.text = False  # whether any was seen
        self._files, self._columns = files, columns
        self._rows = 0
        self._missing: dict[str, tuple[str, list[str]]] = {}  # column: the first file without it, what that has
        self._found: set[str] = set()

    def add(self, name: str, row: int, table: pa.Table) -> None:
        self._rows += len(table)
        for column in self._columns:
            if column in table.column_names:
                self._found.add(column)
                texts = self._texts(name, row, column, table[column])
            else:
                self._missing.setdefault(column, (name, table.column_names))
                texts = [None] * len(table)
            if self.values is not None:
                self.values[column] += texts

    def finish(self) -> None:
        """Raise what only all files together tell."""
        files = self._files
        if not self._rows:
            raise SourceUnreadable(_no_rows(files))
        for column, (name, names) in self._missing.items():
            if column not in self._found:
                raise missing_column(files.repo_id, column, names)
            if not files.absent_is_empty:
                raise missing_column(files.label(name), column, names)
            warn_once(f"{files.label(name)} has no column {column!r}: it is read as empty")

    def _texts(self, name: str, row: int, column: str, values: pa.ChunkedArray) -> list[str | None]:
        """The values if all are text or null. Raises SourceInvalid, naming file and row."""
        if pa.types.is_null(values.type) or pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            self.text = self.text or bool(pc.max(pc.binary_length(values.cast(pa.large_string()))).as_py())
            return values.to_pylist() if self.values is not None else []
        texts: list[Any] = values.to_pylist()
        if str(values.type) == "extension<arrow.json>":  # how `datasets` keeps what is text here and a number there
            texts = [None if text is None else json.loads(text) for text in texts]
        for index, text in enumerate(texts):
            check_text(self._files.repo_id, column, row + index, text, self._place(name))
        self.text = self.text or any(texts)
        return texts

    def _place(self, name: str) -> str:
        """Which of several files, in words."""
        return f" of {self._files.label(name)}" if len(self._files.names) > 1 else ""


def missing_column(where: str, column: str, names: Sequence[str]) -> SourceInvalid:
    """What is said of a column that does not exist, beside those that do."""
    return SourceInvalid(f"{where} has no column {column!r}{did_you_mean(column, names)}; it has {', '.join(names)}")


def check_text(repo_id: str, column: str, row: int, value: Any, place: str = "") -> None:
    """Raise SourceInvalid for a value that is neither text nor null."""
    if not isinstance(value, str | None):
        kind = type(value).__name__
        raise SourceInvalid(f"{repo_id}: column {column!r} is not text (row {row}{place} is {kind})")


def reason(error: BaseException) -> str:
    """Why, in one line: the last cause, for the errors on the way to it only say that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = str(error).strip().splitlines()
    line = words[0].rstrip(" .") if words else type(error).__name__
    return f"{line} (pip install zstandard)" if "zstd not supported" in line else line


def _is_empty(name: str) -> bool:
    """Whether it is a file without a byte, which in a text format is one without rows."""
    path = Path(name)
    return path.suffix != ".parquet" and path.is_file() and path.stat().st_size == 0


def _no_rows(files: DataFiles) -> str:
    if len(files.names) == 1:
        return f"{files.label(files.names[0])} has no rows; fetch it again or name another file"
    return f"none of the {len(files.names)} files of {files.repo_id} has rows; fetch them again or name others"


def _clash(schema: pa.Schema, first: pa.Schema) -> str | None:
    """The first column that differs, in words."""
    for field in schema:
        if field.name not in first.names:
            return f"only the one has column {field.name!r}"
        other = first.field(field.name).type
        if field.type != other:
            return f"column {field.name!r} is {_short(field.type)} in the one and {_short(other)} in the other"
    return None


def _short(kind: pa.DataType) -> str:
    words = "empty" if pa.types.is_null(kind) else str(kind)
    return words if len(words) <= _SHORT else f"{words[:_SHORT]}..."


def _broken_line(name: str) -> str | None:
    """Which line of a local text file is the broken one and why; None if that is not found soon."""
    path = Path(name)
    opened = _OPENERS.get(path.suffix)
    kind = path.suffix if opened is None else path.with_suffix("").suffix
    if kind not in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt") or not path.is_file():
        return None
    try:
        with opened(path) if opened else path.open("rb") as stream:
            return _fault_in(stream.read(_LOOKED_THROUGH), is_json="json" in kind)
    except (OSError, EOFError, ValueError, lzma.LZMAError):  # damaged as a whole
        return None


def _fault_in(content: bytes, *, is_json: bool) -> str | None:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if len(content) == _LOOKED_THROUGH:
        lines.pop()  # cut
    for number, line in enumerate(lines, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x})"
    if not is_json:
        return None
    if lines[0].strip() in (b"[", b"{") or lines[0].lstrip().startswith(b"["):  # one value over several lines
        lines = [content]
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line) if line.strip() else {}
        except ValueError as error:
            within = getattr(error, "lineno", 1) - 1
            return f"line {number + within} is no JSON ({str(error).partition(':')[0]})"
        if len(lines) > 1 and not isinstance(value, dict):
            return f"line {number} is no JSON object but {type(value).__name__}"
    return None
