"""The DuckDB file over the results: an index that can be deleted at any time, there to be asked by SQL.

DuckDB lets one process at a time open a file for writing and locks readers out meanwhile. Nobody waits long for that: a
writer leaves its file to the next one who takes files in, a reader makes an index in its own memory.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from infra.errors import InfraError, QuestionRefused
from infra.log_once import warn_once
from infra.results.files import ResultFiles
from infra.results.index_tables import delete_files, has_views, in_utc, insert, make_tables, make_views, stamps
from infra.results.rows import FORMAT, KINDS, TABLES

T = TypeVar("T")

log = logging.getLogger("slimline")

_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.2
# A writer has less patience than a reader: its file is safe, and whoever has the index may take it in.
_WRITER_TIMEOUT_SECONDS = 0.2
_FILES_AT_ONCE = 200

# What DuckDB says of a broken file, and what it raises for everything else than one.
_DAMAGE = ("not a valid DuckDB database", "orrupt", "checksum", "Could not read enough bytes")
_BROKEN = (duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)
_PASSING = (
    duckdb.ConnectionException,
    duckdb.InterruptException,
    duckdb.OutOfMemoryException,
    duckdb.PermissionException,
    duckdb.TransactionException,
)

# Two threads of one process may not open the file differently (for reading, for writing) at the same time.
_one_at_a_time = threading.Lock()


class _InUse(Exception):
    """Another process has the index."""


class _NotOurs(Exception):
    """The file is in order, but not for us to change: of a newer slimline, or somebody's own database."""


@dataclass(frozen=True)
class Answer:
    """What a question gave: the names of the columns, and the rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


class ResultIndex:
    """The DuckDB file at `path`: what is in `files`, ready to be asked."""

    def __init__(self, path: Path, files: ResultFiles, timeout_seconds: float) -> None:
        self.path = path
        self._files = files
        self._timeout_seconds = timeout_seconds
        self._memory: duckdb.DuckDBPyConnection | None = None

    def update(self) -> None:
        """Take new files in, unless something is wrong with the index: who reads next sees to that."""
        try:
            with _one_at_a_time:
                self._tried(lambda _: None)
        except _InUse as error:
            log.info("%s is in use (%s): left to the next reader", self.path, error)
        except InfraError as error:
            warn_once(f"the index {self.path} is not up to date: {error}")

    def rows(self, table: str, wanted: Mapping[str, object]) -> Iterator[dict[str, Any]]:
        """The rows of a table whose columns have the `wanted` values, by time of recording, then as recorded.

        Over all files that there are now. Raises ResultsUnusable if they cannot be read.
        """
        (kind,) = (kind for kind in KINDS if table in kind.tables)
        names = list(TABLES[table].model_fields)
        conditions = [f"rows.{column} = ?" for column in wanted]
        question = (
            f"SELECT {', '.join(f'rows.{name}' for name in names)} FROM {table} AS rows "
            f"JOIN files ON files.kind = '{kind.name}' AND files.key = rows.{kind.key} "
            f"WHERE {' AND '.join(['true', *conditions])} ORDER BY files.recorded_at, files.name, rows.rowid"
        )
        for values in self.ask(question, list(wanted.values())):
            yield dict(zip(names, map(in_utc, values), strict=True))

    def select(self, question: str, values: Sequence[object] = ()) -> Answer:
        """The answer to a SELECT over all files that there are now, which writes nothing whatever stands in it.

        Raises QuestionRefused, and ResultsUnusable if the files cannot be read.
        """
        _check_select(question)

        def answer(connection: duckdb.DuckDBPyConnection) -> Answer | QuestionRefused:
            connection.execute("BEGIN TRANSACTION READ ONLY")
            try:
                found = connection.execute(question, values)
                return Answer(tuple(column[0] for column in found.description), tuple(found.fetchall()))
            except (*_BROKEN, duckdb.IOException) as error:
                if _is_damage(error):
                    raise
                return _refusal(error)
            except duckdb.Error as error:  # here, for what the user wrote must not look like a damaged index
                return _refusal(error)
            finally:
                with suppress(duckdb.Error):
                    connection.rollback()

        try:
            found = self._answered(answer)
        except duckdb.Error as error:  # of a file that is none of ours
            raise _refusal(error) from error
        if isinstance(found, QuestionRefused):
            raise found
        return found

    def ask(self, question: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """The answer over all files that there are now. Raises ResultsUnusable if they cannot be read."""

        def answer(connection: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
            return connection.execute(question, values).fetchall()  # type: ignore[no-any-return]

        if not self.path.exists() and not self._files.listing():
            return []
        return self._answered(answer)

    def _answered(self, answer: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        """What `answer` makes of the index, or of one in memory if the index is in use or not ours."""
        with _one_at_a_time:
            try:
                found = self._tried(answer, reading=True)
            except _InUse as error:
                log.info("%s is in use (%s): reading the files themselves", self.path, error)
                found = None
            return self._from_memory(answer) if found is None else found

    def _tried(self, use: Callable[[duckdb.DuckDBPyConnection], T], *, reading: bool = False) -> T | None:
        """What `use` makes of the index when it is up to date; None if that cannot be had. Mends a damaged one."""
        for _ in range(2):
            before = _identity(self.path)
            try:
                return self._used(use, reading)
            except _NotOurs as error:
                warn_once(f"the index {self.path} {error}; until then every command reads all files of results")
                return None
            except (duckdb.Error, OSError) as error:
                if not _is_damage(error) or not self._put_aside(error, before):
                    warn_once(f"the index {self.path} cannot be used ({_reason(error)}); reading the files themselves")
                    return None
        return None

    def _used(self, use: Callable[[duckdb.DuckDBPyConnection], T], reading: bool) -> T:
        timeout_seconds = self._timeout_seconds if reading else min(self._timeout_seconds, _WRITER_TIMEOUT_SECONDS)
        if reading and self.path.exists():
            # ConnectionException: somebody in this process has the file open for writing, which we then share.
            with suppress(duckdb.ConnectionException), self._open(timeout_seconds, read_only=True) as connection:
                if self._is_current(connection):
                    return use(connection)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open(timeout_seconds) as connection:
            self._bring_up_to_date(connection)
            return use(connection)

    def _from_memory(self, use: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        connection = self._memory or duckdb.connect(":memory:")
        self._memory = None  # unless all goes well
        self._bring_up_to_date(connection)
        self._memory = connection
        return use(connection)

    def _is_current(self, connection: duckdb.DuckDBPyConnection) -> bool:
        current = self._format(connection) == FORMAT and has_views(connection)
        return current and stamps(connection) == self._files.listing()

    def _bring_up_to_date(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Make the tables say what the files say, all at once or not at all."""
        found = self._format(connection)
        connection.begin()
        if found != FORMAT:
            make_tables(connection)
        if not has_views(connection):
            make_views(connection)
        known, listing = stamps(connection), self._files.listing()
        # a file that is replaced while the folder is listed may be missed there
        gone = [name for name in known.keys() - listing.keys() if not (self._files.folder / name).exists()]
        if gone:
            log.warning("%d of the results that were in %s are no longer there", len(gone), self._files.folder)
        changed = {name: stamp for name, stamp in listing.items() if known.get(name) != stamp}
        delete_files(connection, [*gone, *(changed.keys() & known.keys())])
        records = self._files.read(changed)
        while some := list(islice(records, _FILES_AT_ONCE)):
            insert(connection, some, changed)
        connection.commit()

    def _format(self, connection: duckdb.DuckDBPyConnection) -> int:
        """The format of the index, 0 if the file is new."""
        try:
            ((found,),) = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchall()
        except duckdb.CatalogException:
            if connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
                raise _NotOurs("is a database of somebody else; set SLIMLINE_RESULTS_DB to another file") from None
            return 0
        if found > FORMAT:
            raise _NotOurs(
                f"was made by a newer slimline (schema {found}, this one knows {FORMAT}); upgrade slimline or set "
                "SLIMLINE_RESULTS_DB to another file"
            )
        return int(found)

    def _put_aside(self, error: Exception, before: tuple[int, int] | None) -> bool:
        """Rename a damaged index, so that it is made anew; whatever it is, it is not deleted."""
        if not self.path.is_file():
            return False
        if _identity(self.path) != before:
            return True  # another process was faster
        aside = self.path.with_name(f"{self.path.name}.damaged")
        try:
            os.replace(self.path, aside)
            self.path.with_name(f"{self.path.name}.wal").unlink(missing_ok=True)
        except OSError:
            return False
        log.warning(
            "the index %s is damaged (%s); it is now %s, and made anew from the files in %s",
            *(self.path, _reason(error), aside.name, self._files.folder),
        )
        return True

    def _open(self, timeout_seconds: float, *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
        """Open the file, waiting with jittered, growing pauses while another process has it. Raises _InUse."""
        deadline = time.monotonic() + timeout_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return duckdb.connect(str(self.path), read_only=read_only)
            except duckdb.IOException as error:
                if "Conflicting lock" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise _InUse(_reason(error)) from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _refusal(error: Exception) -> QuestionRefused:
    hints = [line for line in str(error).splitlines()[1:] if line.startswith(("Did you mean", "Candidate bindings"))]
    words = " ".join([_reason(error), *hints])
    return QuestionRefused(f"DuckDB cannot answer that: {words} (all tables: slimline help results-schema)")


def _check_select(question: str) -> None:
    """Raises QuestionRefused for what is no single SELECT, DESCRIBE, SHOW or SUMMARIZE."""
    try:
        statements = duckdb.extract_statements(question)
    except duckdb.Error as error:
        raise QuestionRefused(f"DuckDB cannot read that: {_reason(error)}") from error
    if len(statements) != 1:
        raise QuestionRefused(f"one question at a time: that is {len(statements)} statements; ask with one SELECT")
    kind = statements[0].type
    if kind != duckdb.StatementType.SELECT:
        raise QuestionRefused(
            f"results are only read: {kind.name} is not allowed; ask with SELECT, DESCRIBE, SHOW or SUMMARIZE"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _is_damage(error: Exception) -> bool:
    """Whether the file itself is broken, rather than in use, unwritable or on a full disk."""
    if isinstance(error, duckdb.IOException):
        return any(word in str(error) for word in _DAMAGE)
    return isinstance(error, duckdb.Error) and not isinstance(error, _PASSING)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]
