"""One Prefect server for all workers of a test run: starting one takes as much of a core as a dozen small flows do."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from infra.filesystem.locks import flocked

#: in the folder: a database of a server with which nobody has spoken; making one takes longer than the server's start
BLANK = "blank-prefect.db"


@contextmanager
def shared_server(folder: Path) -> Iterator[str]:
    """The URL of its API. Who asks first starts it, with an empty database in `folder`, and ends last.

    Nothing is left behind: it ends with the process that started it, however that ended (kill -9, Ctrl-C).
    """
    url, turn = folder / "server-url", folder / "server.lock"
    with (folder / "server-users.lock").open("w") as users:
        # held until this process has ended or does without; the kernel frees it in either case
        fcntl.flock(users, fcntl.LOCK_SH)
        with flocked(turn):
            ours = not url.exists()
            if ours:
                api = _started(folder / "server.db")
                _copy(folder / "server.db", folder / BLANK)
                url.write_text(api)
        with _reported_to(url.read_text()) as api:
            yield api
        if ours:
            with flocked(turn):
                url.unlink()  # who comes now starts another
            fcntl.flock(users, fcntl.LOCK_EX)
            _stop()


def _started(database: Path) -> str:
    """Start the server that our commands start where none is given; returns its API's URL.

    Of Prefect's services it lacks those that keep and watch all events, which no test of this server asks for: they
    take two fifths of its time.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import (
        PREFECT_SERVER_DATABASE_CONNECTION_URL,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED,
        PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED,
        temporary_settings,
    )

    from flows.runtime.servers import start_temporary_server

    own = {
        PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{database}",
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 300,
        PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED: False,
        PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED: False,
    }
    with temporary_settings(own):
        start_temporary_server()
    return SubprocessASGIServer().api_url


def _copy(database: Path, target: Path) -> None:
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)  # what is in the write-ahead log included


def _stop() -> None:
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    assert server.server_process is not None
    assert server.server_process.stdin is not None
    server.server_process.stdin.close()  # what it takes for the end of this process
    server.server_process.wait()
    server.stop()


@contextmanager
def _reported_to(api: str) -> Iterator[str]:
    """As Prefect's own `prefect_test_harness`: flows of this process report there, and have reported at the end."""
    from prefect.context import _temporary_global_settings_context, get_settings_context
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), _temporary_global_settings_context(get_settings_context()):
        yield api
        APILogWorker.drain_all()
        EventsWorker.drain_all()
