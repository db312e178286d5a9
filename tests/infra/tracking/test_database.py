"""What is at an MLflow tracking URI, told without mlflow and before any work."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from infra.errors import TrackingUnusable
from infra.tracking.database import check_store
from infra.tracking.tracker import Tracker

pytestmark = pytest.mark.slow  # not in `make test-fast`


def of_revision(path: Path, revision: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", [revision])
        connection.commit()
    return path


def refused(uri: str) -> str:
    with pytest.raises(TrackingUnusable) as caught:
        check_store(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def junk(path: Path) -> Path:
    path.write_bytes(b"no database at all, but text that is long enough to be looked at as one " * 9)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: of_revision(path, "ffffffffffff"), "its schema ffffffffffff is of a newer mlflow"),
        # of mlflow 1.0
        (lambda path: of_revision(path, "451aebb31d03"), "is of an older mlflow; copy it and run: mlflow db upgrade"),
        (junk, "file is not a database"),
        (folder, "is a folder"),
        (lambda path: junk(path) / "mlflow.db", "is no folder"),
    ],
)
def test_a_database_that_mlflow_would_refuse(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    path = make(tmp_path / "mlflow.db")
    message = refused(f"sqlite:///{path}")
    assert message.startswith(f"MLflow at sqlite:///{path} cannot be used: ")
    assert words in message
    with pytest.raises(TrackingUnusable, match="cannot be used"):
        Tracker(f"sqlite:///{path}").check()


@pytest.mark.parametrize(
    "uri, words",
    [
        ("nonsense://x", "nonsense: is none of sqlite, postgresql"),
        ("http://[x", "it is no URI"),
        ("mssql+pyodbc://x/y", "pip install pyodbc"),
    ],
)
def test_a_uri_that_mlflow_would_refuse(uri: str, words: str) -> None:
    assert words in refused(uri)


def test_a_database_that_mlflow_made_is_accepted(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}")
    check_store(tracker.uri)  # it is not there yet
    assert not tracker.has("run-v1-0")
    tracker._client()
    check_store(tracker.uri)


def test_a_server_that_does_not_answer_may_do_so_later(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="slimline"):
        check_store("http://me:swordfish@127.0.0.1:9")
    (record,) = caplog.records
    assert "MLflow at http://me:***@127.0.0.1:9 does not answer now" in record.getMessage()
    assert "Connection refused" in record.getMessage()


def test_mlflow_is_not_imported(tmp_path: Path) -> None:
    code = (
        f"from infra.tracking.database import check_store; check_store('sqlite:///{tmp_path}/x.db'); "
        "import sys; assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
