"""All results of all runs in one DuckDB file: runs, their stages, metrics and per-layer pruning errors.

DuckDB lets one process at a time open a file for writing and locks readers out meanwhile, so connections are short and
retried. `record` is idempotent: a run that is recorded again replaces its own rows in one transaction.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import duckdb

from infra.errors import ResultsUnusable
from infra.result_rows import TABLES, LayerRow, MetricRow, Row, RunRow, StageRow

__all__ = ["MIGRATIONS", "TABLES", "LayerRow", "MetricRow", "Migration", "ResultsStore", "RunRow", "StageRow"]

Migration = Callable[[duckdb.DuckDBPyConnection], object]

R = TypeVar("R", bound=Row)

_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.5
_WAY_OUT = "move it away (it is built anew from the next run on) or set SLIMLINE_RESULTS_DB to another file"

# Two threads of one process may not open the file differently (for reading, for writing) at the same time.
_one_at_a_time = threading.Lock()


def _create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    # No keys: a run's rows are replaced as a whole, and DuckDB 2.0 cannot drop a key column in a later migration. Times
    # are UTC without a zone: for times with one DuckDB needs pytz in Python, and shows them in the reader's zone.
    connection.execute("""
        CREATE TABLE runs (
            run_key VARCHAR NOT NULL, name VARCHAR NOT NULL, spec JSON NOT NULL, status VARCHAR NOT NULL,
            started_at TIMESTAMP NOT NULL, finished_at TIMESTAMP NOT NULL, prefect_run_id VARCHAR,
            mlflow_run_id VARCHAR, slimline_version VARCHAR NOT NULL, git_revision VARCHAR, message VARCHAR);
        CREATE TABLE stages (
            run_key VARCHAR NOT NULL, name VARCHAR NOT NULL, stage_key VARCHAR NOT NULL, kind VARCHAR NOT NULL,
            status VARCHAR NOT NULL, seconds DOUBLE, message VARCHAR);
        CREATE TABLE metrics (
            run_key VARCHAR NOT NULL, checkpoint VARCHAR NOT NULL, checkpoint_key VARCHAR NOT NULL,
            stage_key VARCHAR NOT NULL, suite VARCHAR NOT NULL, task VARCHAR NOT NULL, metric VARCHAR NOT NULL,
            value DOUBLE NOT NULL, stderr DOUBLE, num_fewshot INTEGER, num_examples BIGINT, task_version VARCHAR,
            protocol JSON NOT NULL);
        CREATE TABLE layers (
            run_key VARCHAR NOT NULL, stage_key VARCHAR NOT NULL, layer INTEGER NOT NULL, sub_layer VARCHAR NOT NULL,
            kept BIGINT NOT NULL, total BIGINT NOT NULL, sparsity DOUBLE NOT NULL, predicted_error DOUBLE,
            measured_error DOUBLE, heldout_error DOUBLE, condition DOUBLE, seconds DOUBLE, num_tokens BIGINT);
    """)


MIGRATIONS: tuple[Migration, ...] = (_create_tables,)
"""Migration i (from 0) brings the schema from version i to i + 1. Only ever append: files of all versions exist."""


class ResultsStore:
    """The results file at `path`, made on the first `record`. Every method raises ResultsUnusable if it cannot be used.

    `timeout_seconds` is how long to wait while other processes hold the file.
    """

    def __init__(
        self, path: Path, *, migrations: Sequence[Migration] = MIGRATIONS, timeout_seconds: float = 60.0
    ) -> None:
        self.path = path
        self._migrations = tuple(migrations)
        self._timeout_seconds = timeout_seconds

    def record(
        self,
        run: RunRow,
        stages: Sequence[StageRow] = (),
        metrics: Sequence[MetricRow] = (),
        layers: Sequence[LayerRow] = (),
    ) -> None:
        """Write everything about a run in one transaction; what was recorded under its key before is replaced."""
        rows: dict[str, Sequence[Row]] = {"runs": (run,), "stages": stages, "metrics": metrics, "layers": layers}
        assert all(row.run_key == run.run_key for table in rows.values() for row in table), "rows of another run"
        with self._connection() as connection:
            connection.begin()
            self._migrate(connection)
            for table, new in rows.items():
                connection.execute(f"DELETE FROM {table} WHERE run_key = ?", [run.run_key])
                _insert(connection, table, new)
            connection.commit()

    def runs(self) -> tuple[RunRow, ...]:
        """All runs, in the order in which they were recorded."""
        return self._rows("runs", RunRow, None)

    def stages(self, run_key: str | None = None) -> tuple[StageRow, ...]:
        """Stages of one run, or of all, in the order given to `record`."""
        return self._rows("stages", StageRow, run_key)

    def metrics(self, run_key: str | None = None) -> tuple[MetricRow, ...]:
        """Metrics of one run, or of all, in the order given to `record`."""
        return self._rows("metrics", MetricRow, run_key)

    def layers(self, run_key: str | None = None) -> tuple[LayerRow, ...]:
        """Layers of one run, or of all, in the order given to `record`."""
        return self._rows("layers", LayerRow, run_key)

    def _rows(self, table: str, row: type[R], run_key: str | None) -> tuple[R, ...]:
        if not self.path.exists():
            return ()
        self._bring_up_to_date()
        columns = ", ".join(row.model_fields)
        where, values = ("", []) if run_key is None else ("WHERE run_key = ?", [run_key])
        with self._connection(read_only=True) as connection:
            found = connection.execute(f"SELECT {columns} FROM {table} {where} ORDER BY rowid", values).fetchall()
        named = (zip(row.model_fields, record, strict=True) for record in found)
        return tuple(row.model_validate({name: _field_value(value) for name, value in fields}) for fields in named)

    def _bring_up_to_date(self) -> None:
        with self._connection(read_only=True) as connection:
            outdated = self._version(connection) < len(self._migrations)
        if outdated:
            with self._connection() as connection:
                connection.begin()
                self._migrate(connection)
                connection.commit()

    def _migrate(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Bring the schema to our version, inside the caller's transaction."""
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER, applied_at TIMESTAMP)")
        for version in range(self._version(connection), len(self._migrations)):
            self._migrations[version](connection)
            applied_at = _column_value(datetime.now(UTC))
            connection.execute("INSERT INTO schema_version VALUES (?, ?)", [version + 1, applied_at])

    def _version(self, connection: duckdb.DuckDBPyConnection) -> int:
        try:
            found = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
        except duckdb.CatalogException:
            return 0
        version = int(found[0]) if found else 0
        if version > len(self._migrations):
            raise ResultsUnusable(
                f"{self.path} was written by a newer slimline (schema {version}, this one knows "
                f"{len(self._migrations)}); upgrade slimline or set SLIMLINE_RESULTS_DB to another file"
            )
        return version

    @contextmanager
    def _connection(self, *, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of our own; leaving it without a commit rolls back."""
        try:
            with _one_at_a_time, self._open(read_only) as connection:
                yield connection
        except (duckdb.Error, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ResultsUnusable(f"the results file {self.path} cannot be used: {reason}; {_WAY_OUT}") from error

    def _open(self, read_only: bool) -> duckdb.DuckDBPyConnection:
        """Open the file, waiting with jittered, growing pauses while another process has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self._timeout_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return duckdb.connect(str(self.path), read_only=read_only)
            except duckdb.IOException as error:
                if "Conflicting lock" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise ResultsUnusable(
                        f"{self.path} has been in use for {self._timeout_seconds:.0f} s; close the program that has it "
                        f"open and run again ({str(error).splitlines()[0]})"
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Row]) -> None:
    # One statement per table: executemany takes 0.5 ms a row, and an MMLU run has hundreds.
    if not rows:
        return
    columns = list(TABLES[table].model_fields)
    marks = ", ".join(["(" + ", ".join("?" * len(columns)) + ")"] * len(rows))
    values = [_column_value(getattr(row, column)) for row in rows for column in columns]
    connection.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES {marks}", values)


def _column_value(value: object) -> object:
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


def _field_value(value: object) -> object:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) else value
