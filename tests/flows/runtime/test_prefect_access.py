"""A Prefect that cannot be used costs one sentence before any flow starts: what it is, who says so, and the way out."""

from __future__ import annotations

import http.server
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from flows.errors import PrefectUnusable
from flows.runtime import prefect_access
from flows.runtime.prefect_access import check_prefect, import_prefect
from flows.runtime.prefect_database import check_database
from tests.flows.commands.test_command_line import only_complaint
from tests.flows.home import Home

pytestmark = pytest.mark.slow  # not in `make test-fast`

KNOWN = "8bb517bae6f9"
"""A revision of June 2025: every Prefect that we allow has its migration."""

CLOSED = "http://127.0.0.1:9/api"
"""Port 9 is the discard service, which nobody runs."""


def database(path: Path, *statements: str) -> Path:
    """An sqlite file with these tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


def of_revision(path: Path, revision: str) -> Path:
    """A database that says that it is of a revision."""
    return database(
        path,
        "CREATE TABLE alembic_version (version_num VARCHAR)",
        f"INSERT INTO alembic_version VALUES ('{revision}')",
    )


@contextmanager
def url(setting: str, value: str) -> Iterator[None]:
    import prefect.settings

    with prefect.settings.temporary_settings({getattr(prefect.settings, setting): value}):
        yield


def refused_database(path: Path, patience: float = 0.1) -> str:
    with (
        url("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{path}"),
        pytest.raises(PrefectUnusable) as caught,
    ):
        check_database(patience)
    assert "\n" not in str(caught.value)
    assert "set PREFECT_HOME or PREFECT_API_DATABASE_CONNECTION_URL to another place" in str(caught.value)
    return str(caught.value)


def junk(path: Path) -> Path:
    path.write_bytes(b"no database at all, but text that is long enough to be looked at as one " * 9)
    return path


def cut(path: Path) -> Path:
    """The first page of two hundred."""
    database(path, "CREATE TABLE t (x)", "INSERT INTO t VALUES (zeroblob(800000))")
    path.write_bytes(path.read_bytes()[:4096])
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: of_revision(path, "ffffffffffff"), "is of revision ffffffffffff, which Prefect"),
        (lambda path: database(path, "CREATE TABLE songs (x)"), "it has tables, such as songs"),
        (junk, "file is not a database"),
        (cut, "malformed"),
        (folder, "is a folder"),
        (lambda path: path.parent / "none/none/prefect.db", "there is no folder"),
        (lambda path: junk(path) / "prefect.db", "is no folder"),
    ],
)
def test_a_database_that_prefect_could_not_use(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    path = make(tmp_path / "prefect.db")
    message = refused_database(path)
    assert str(path) in message
    assert words in message


def test_a_locked_database(tmp_path: Path) -> None:
    path = of_revision(tmp_path / "prefect.db", KNOWN)
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        somebody.execute("BEGIN EXCLUSIVE")
        assert "has been locked by another program" in refused_database(path)
    assert of_this_prefect(path) == str(path)


def of_this_prefect(path: Path) -> str:
    with url("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{path}"):
        return check_database()


def test_databases_that_prefect_can_use(tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    empty.touch()
    assert of_this_prefect(of_revision(tmp_path / "prefect.db", KNOWN)) == str(tmp_path / "prefect.db")
    for new in (empty, tmp_path / "new.db", tmp_path / "home/new.db"):
        assert of_this_prefect(new) == f"{new}, which the first run makes"
    assert not (tmp_path / "home").exists()
    with url("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:///:memory:"):
        assert check_database() == "in memory"


def test_a_disk_without_room_for_a_database(small_disk: Path) -> None:
    assert "MiB free and a server needs" in refused_database(small_disk / "prefect.db")


@pytest.mark.parametrize(
    "connection, words",
    [
        ("mysql://somewhere/x", "names no database that Prefect can use"),
        ("nonsense", "names no database that Prefect can use"),
        ("postgresql+asyncpg://me:swordfish@127.0.0.1:9/x", "does not answer (Connection refused)"),
        ("postgresql+asyncpg://127.0.0.1:99999/x", "does not answer"),
    ],
)
def test_a_database_elsewhere(connection: str, words: str) -> None:
    with url("PREFECT_API_DATABASE_CONNECTION_URL", connection), pytest.raises(PrefectUnusable) as caught:
        check_database()
    assert words in str(caught.value)
    assert "swordfish" not in str(caught.value)


@contextmanager
def answering(status: int, body: bytes, version: bytes = b"") -> Iterator[str]:
    """A web server that gives every question the same answer, but for that of the version; yields a URL."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = version if version and self.path.endswith("/version") else body
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def refused_server(api: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(prefect_access, "_PAUSE", 0.01)
    monkeypatch.setenv("PREFECT_API_URL", api)
    with url("PREFECT_API_URL", api), pytest.raises(PrefectUnusable) as caught:
        check_prefect()
    message = str(caught.value)
    assert "\n" not in message
    assert "(environment variable PREFECT_API_URL)" in message
    assert message.endswith("unset PREFECT_API_URL for a temporary server")
    return message


@pytest.mark.parametrize(
    "status, body, version, words",
    [
        (401, b"{}", b"", "refuses us (HTTP 401); give it PREFECT_API_AUTH_STRING or PREFECT_API_KEY"),
        (403, b"{}", b"", "refuses us (HTTP 403)"),
        (500, b"", b"", "answers with an error of its own (HTTP 500); see its log"),
        (404, b"", b"", "is no Prefect server (HTTP 404)"),
        (200, b"<html>", b"", "is no Prefect server"),
        (200, b"true", b"[1]", "is no Prefect server"),
        (200, b"true", b'"2.20.1"', "is of version 2.20.1, and Prefect 3."),
    ],
)
def test_a_server_that_is_none_of_ours(
    status: int, body: bytes, version: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, body, version) as api:
        assert words in refused_server(api, monkeypatch)


@pytest.mark.parametrize(
    "api, words",
    [
        ("http://nowhere.invalid/api", "does not answer"),
        ("http://me:swordfish@127.0.0.1:9/api", "http://me:***@127.0.0.1:9/api"),
        ("nonsense", "has a URL that is none"),
        ("http://127.0.0.1:port/api", "has a URL that is none"),
    ],
)
def test_a_server_that_cannot_be_reached(api: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words in refused_server(api, monkeypatch)


def test_a_server_that_speaks_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, b"true") as api:
        assert "cannot be trusted or speaks no TLS" in refused_server(api.replace("http:", "https:"), monkeypatch)


def test_a_server_that_answers(prefect_server: str) -> None:
    assert check_prefect().startswith(f"{prefect_server} answers (")


def test_no_server_and_no_temporary_one() -> None:
    with (
        url("PREFECT_API_URL", ""),
        url("PREFECT_SERVER_EPHEMERAL_ENABLED", "false"),
        pytest.raises(
            PrefectUnusable, match="PREFECT_API_URL is not set and PREFECT_SERVER_EPHEMERAL_ENABLED is false"
        ),
    ):
        check_prefect()


def test_results_that_prefect_cannot_keep(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        url("PREFECT_LOCAL_STORAGE_PATH", str(tmp_path / "file/results")),
        pytest.raises(PrefectUnusable, match=r"is no folder.*; make it writable, or set SLIMLINE_HOME"),
    ):
        check_prefect()


def test_profiles_that_are_no_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles.toml").write_text("active = [unfinished")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
    with pytest.raises(PrefectUnusable, match=r"profiles.toml cannot be read .*; mend that file, or remove it"):
        import_prefect()


def alone(tmp_path: Path, offline_root: Path, **variables: str) -> Home:
    """A home whose commands find no server unless these variables name one, and have a PREFECT_HOME of their own."""
    home = Home.create(tmp_path / "home", offline_root)
    home.variables.update(PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_API_URL="", **variables)
    return home


def test_a_run_with_the_database_of_a_newer_prefect_ends_at_once(tmp_path: Path, offline_root: Path) -> None:
    home = alone(tmp_path, offline_root)
    path = of_revision(tmp_path / "prefect/prefect.db", "ffffffffffff")
    line = only_complaint(home.child("run", "smoke", code=2))
    assert line.startswith(f"Prefect's database {path} is of revision ffffffffffff")
    bad = [line for line in home.child("doctor", code=2).stdout.splitlines() if line.startswith("BAD")]
    assert len(bad) == 1
    assert bad[0].startswith(f"BAD  server (Prefect): Prefect's database {path} is of revision ffffffffffff")


def test_the_profile_that_names_an_unreachable_server_is_named(tmp_path: Path, offline_root: Path) -> None:
    home = alone(tmp_path, offline_root)
    profiles = tmp_path / "prefect/profiles.toml"
    profiles.parent.mkdir()
    profiles.write_text(f'active = "night"\n[profiles.night]\nPREFECT_API_URL = "{CLOSED}"\n')
    del home.variables["PREFECT_API_URL"]
    line = only_complaint(home.child("nightly", "smoke", code=2))
    assert line.startswith(f"the Prefect server at {CLOSED} (profile 'night' in {profiles}) does not answer")
    assert line.endswith("`prefect config unset PREFECT_API_URL` for a temporary server")


def test_a_setting_that_prefect_cannot_read_is_named(tmp_path: Path, offline_root: Path) -> None:
    home = alone(tmp_path, offline_root, PREFECT_API_REQUEST_TIMEOUT="soon")
    line = only_complaint(home.child("plan", "smoke", code=2))
    assert "environment variable PREFECT_API_REQUEST_TIMEOUT is 'soon'" in line


@pytest.mark.server
@pytest.mark.slow
def test_a_temporary_server_that_does_not_come_up_says_why(tmp_path: Path, offline_root: Path) -> None:
    """A database that is of a known revision but has not its tables: only the server itself can find that out."""
    home = alone(tmp_path, offline_root)
    of_revision(tmp_path / "prefect/prefect.db", KNOWN)
    line = only_complaint(home.child("run", "smoke", code=2))
    assert line.startswith("Prefect's temporary server ended before it was ready (")
    assert "no such table" in line
