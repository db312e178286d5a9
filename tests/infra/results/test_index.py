"""The index: whatever happens to the DuckDB file, no row is lost and every answer is right."""

from __future__ import annotations

import logging
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pytest

from infra.log_once import warn_once
from infra.results.rows import FORMAT
from infra.results.store import ResultsStore
from tests.infra.processes import kill_after_line, start
from tests.infra.result_examples import layer_row, metric_row, night_row, run_row, stage_row

pytestmark = pytest.mark.slow  # not in `make test-fast`


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> None:
    warn_once.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "results.duckdb", timeout_seconds=0.2)


def again(store: ResultsStore) -> ResultsStore:
    """The store as the next process sees it."""
    return ResultsStore(store.path, store.files.folder, timeout_seconds=0.2)


def keys(store: ResultsStore) -> list[str]:
    return [run.run_key for run in store.runs()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def indexed(path: Path) -> list[str]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return [key for (key,) in connection.execute("SELECT run_key FROM runs ORDER BY run_key").fetchall()]


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the file open all the time."""
    user = start(
        "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print('open', flush=True); time.sleep(600)", path
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "open\n"
    try:
        yield user
    finally:
        user.kill()
        user.communicate()


def test_record_leaves_an_index_for_sql(store: ResultsStore) -> None:
    store.record(run_row("a"))
    store.record(run_row("b"))
    assert indexed(store.path) == ["a", "b"]


def test_a_deleted_index_is_made_anew(store: ResultsStore, caplog: pytest.LogCaptureFixture) -> None:
    store.record(run_row(), [stage_row()], [metric_row()], [layer_row()])
    store.record_night(night_row())
    store.path.unlink()
    assert store.runs() == (run_row(),)
    assert (store.stages(), store.metrics(), store.layers()) == ((stage_row(),), (metric_row(),), (layer_row(),))
    assert store.nights() == (night_row(),)
    assert indexed(store.path) == ["r1"]
    assert warnings(caplog) == []


@pytest.mark.parametrize("content", [b"not a database" * 1000, b"", b"short"])
def test_a_damaged_index_is_put_aside_with_one_warning(
    content: bytes, store: ResultsStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.record(run_row("a"), metrics=[metric_row("a")])
    for use in (lambda: store.metrics(), lambda: store.record(run_row("b"))):
        store.path.write_bytes(content)
        caplog.clear()
        use()
        (warning,) = warnings(caplog)
        assert f"{store.path} is damaged" in warning
        assert "it is now results.duckdb.damaged, and made anew" in warning
        assert store.path.with_name("results.duckdb.damaged").read_bytes() == content
    assert keys(again(store)) == ["a", "b"]
    assert indexed(store.path) == ["a", "b"]


def test_whatever_block_is_damaged_the_answer_is_right(store: ResultsStore) -> None:
    metrics = tuple(metric_row(task=f"t{index}") for index in range(500))
    store.record(run_row(), metrics=metrics)
    whole = store.path.read_bytes()
    dice = random.Random(0)
    for _ in range(5):
        content = bytearray(whole)
        place = dice.randrange(len(content))
        content[place : place + 3000] = dice.randbytes(len(content[place : place + 3000]))
        store.path.write_bytes(content)
        assert again(store).metrics() == metrics
        again(store).record(run_row())
        assert (again(store).runs(), again(store).metrics()) == ((run_row(),), ())
        store.record(run_row(), metrics=metrics)


def test_an_old_write_ahead_log_does_no_harm(store: ResultsStore) -> None:
    store.record(run_row())
    store.path.with_name("results.duckdb.wal").write_bytes(b"of another file" * 100)
    assert keys(store) == ["r1"]
    store.path.unlink()
    store.path.with_name("results.duckdb.wal").write_bytes(b"of another file" * 100)
    assert keys(store) == ["r1"]


def test_a_table_dropped_by_hand_comes_back(store: ResultsStore) -> None:
    store.record(run_row("a"), metrics=[metric_row("a")])
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("DROP TABLE metrics")
    assert store.metrics() == (metric_row("a"),)


@pytest.mark.parametrize("place", ["folder.duckdb", "file/results.duckdb", "/proc/no/r.duckdb"])
def test_where_no_index_can_be_the_files_are_read(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder.duckdb").mkdir()
    (tmp_path / "file").touch()
    store = ResultsStore(tmp_path / place, tmp_path / "shared")
    for key in "ab":
        store.record(run_row(key))
    assert keys(store) == ["a", "b"]
    (warning,) = warnings(caplog)
    assert f"{store.path} cannot be used" in warning


def test_an_index_in_use_delays_nobody(store: ResultsStore) -> None:
    store.record(run_row("a"))
    with held(store.path):
        store.record(run_row("b"))
        assert keys(store) == keys(again(store)) == ["a", "b"]
        again(store).record(run_row("c"))
        again(store).record(run_row("a", status="failed"))
        assert keys(store) == ["b", "c", "a"]
    assert indexed(store.path) == ["a"]
    assert keys(store) == ["b", "c", "a"]
    assert indexed(store.path) == ["a", "b", "c"]


def test_an_index_that_this_process_has_open_is_shared(store: ResultsStore) -> None:
    store.record(run_row("a"))
    with duckdb.connect(str(store.path)):
        store.record(run_row("b"))
        assert keys(store) == ["a", "b"]
    with duckdb.connect(str(store.path), read_only=True):
        store.record(run_row("c"))
        assert keys(again(store)) == ["a", "b", "c"]


def test_an_index_of_a_newer_slimline_is_left_alone(store: ResultsStore, caplog: pytest.LogCaptureFixture) -> None:
    store.record(run_row("a"))
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("INSERT INTO schema_version (version) VALUES (99)")
    store.record(run_row("b"))
    assert keys(again(store)) == ["a", "b"]
    assert indexed(store.path) == ["a"]
    (warning,) = warnings(caplog)
    assert (
        f"newer slimline (schema 99, this one knows {FORMAT}); upgrade slimline or set SLIMLINE_RESULTS_DB" in warning
    )


def test_the_database_of_somebody_else_is_left_alone(store: ResultsStore, caplog: pytest.LogCaptureFixture) -> None:
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("CREATE TABLE runs AS SELECT 'mine' AS run_key")
    store.record(run_row())
    assert keys(store) == ["r1"]
    assert indexed(store.path) == ["mine"]
    (warning,) = warnings(caplog)
    assert "set SLIMLINE_RESULTS_DB to another file" in warning


def test_a_reader_needs_no_right_to_write(store: ResultsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.record(run_row())
    modes = []
    real = duckdb.connect

    def connect(path: str, read_only: bool = False) -> duckdb.DuckDBPyConnection:
        modes.append(read_only)
        return real(path, read_only=read_only)

    monkeypatch.setattr(duckdb, "connect", connect)
    assert keys(again(store)) == ["r1"]
    assert modes == [True]


def test_a_kill_inside_the_transaction_leaves_an_index_that_catches_up(store: ResultsStore) -> None:
    store.record(run_row("before"))
    code = """
import sys, time
from pathlib import Path
import infra.results.index as index
from infra.results.store import ResultsStore
from tests.infra.result_examples import metric_row, run_row
real = index.insert
def slow(*arguments):
    real(*arguments)
    print("half", flush=True)
    time.sleep(600)
index.insert = slow
ResultsStore(Path(sys.argv[1])).record(run_row("late"), metrics=[metric_row("late")])
"""
    assert kill_after_line(start(code, store.path)) == "half"
    assert indexed(store.path) == ["before"]
    assert keys(store) == ["before", "late"]
    assert store.metrics() == (metric_row("late"),)


def test_an_index_of_an_older_format_is_made_anew_from_the_files(store: ResultsStore) -> None:
    store.record(run_row("r1"), metrics=[metric_row("r1")])
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("UPDATE schema_version SET version = 2; DELETE FROM metrics; ALTER TABLE runs ADD old TEXT")
    assert again(store).metrics() == (metric_row("r1"),)
    assert keys(store) == indexed(store.path) == ["r1"]
