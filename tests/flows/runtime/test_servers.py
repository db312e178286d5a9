"""Servers end with whoever started them, however that went, and nobody else's server is touched."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.errors import SpecError
from flows.runtime import exit_with_parent
from flows.runtime.servers import serve_pages
from infra.settings import Settings
from tests.command_line import PROJECT
from tests.flows.home import Home
from tests.flows.serving import alive, alive_in, free_port, started, wait_for

pytestmark = pytest.mark.slow  # not in `make test-fast`

#: seconds after which nothing may be left
SOON = 20.0
#: what tells a Prefect server is the command line; one that takes its time, with a worker
_SERVER = """
import os, signal, subprocess, sys, time
if sys.argv[2:]:
    subprocess.Popen([sys.executable, "-c", open(sys.argv[1]).read(), sys.argv[1]])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + f".{os.getpid()}", "w").close()
time.sleep(60)
"""
_STARTER = """
import sys, time
from flows.runtime.interrupts import until_stopped
from flows.runtime.servers import Server
with until_stopped():
    server = Server("Some", [sys.executable, *sys.argv[1:]], {}, "SIGTERM")
    try:
        time.sleep(60)
    finally:
        server.stop()
"""
#: a server that answers for a while and then ends of itself
_MORTAL = """
import http.server, sys, time
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
with http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy) as server:
    server.timeout = 1
    server.handle_request()
print("x" * 100_000, "\\n", *range(1000), sep="\\n", flush=True)
if sys.argv[2:]:
    raise OSError("the disk is full")
sys.exit(7)
"""
_USER = """
import sys, time
from flows.errors import SpecError
from flows.runtime import servers
from flows.runtime.interrupts import until_stopped
servers._start_prefect = lambda port: servers.Server("Prefect", [sys.executable, "-c", *sys.argv[1:]], {})
try:
    with until_stopped(), servers.prefect_server(int(sys.argv[2])):
        time.sleep(60)
except SpecError as error:
    print(error)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_server_and_its_workers_end_with_their_starter(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "server"
    script.write_text(_SERVER)
    command = [sys.executable, "-c", _STARTER, str(script), str(script), "with a worker"]
    starter = subprocess.Popen(command, cwd=PROJECT)
    try:
        wait_for(lambda: len(list(tmp_path.glob("server.*"))) == 2, 20, starter)
        pids = [int(path.suffix[1:]) for path in tmp_path.glob("server.*")]
        assert all(map(alive, pids))
        starter.send_signal(number)
        assert starter.wait(SOON) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        wait_for(lambda: not any(map(alive, pids)), SOON)
    finally:
        starter.kill()


def test_a_server_does_not_hear_what_all_processes_are_told(tmp_path: Path) -> None:
    """A service manager stops a run: it ends its stages and tells the server how they went."""
    ready = tmp_path / "ready"
    code = f"import time; open({str(ready)!r}, 'w').close(); time.sleep(60)"
    command = [sys.executable, exit_with_parent.__file__, "SIGINT", sys.executable, "-c", code]
    tether = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert tether.stdin is not None
    try:
        wait_for(ready.exists, 20, tether)
        (server,) = (int(pid) for pid in Path(f"/proc/{tether.pid}/task/{tether.pid}/children").read_text().split())
        for number in (signal.SIGTERM, signal.SIGHUP):
            tether.send_signal(number)
            os.kill(server, number)
        time.sleep(0.5)
        assert tether.poll() is None
        tether.stdin.close()
        assert tether.wait(SOON) == 128 + signal.SIGINT
        assert not alive(server)
    finally:
        tether.kill()


@pytest.mark.parametrize(
    "raises, words",
    [
        (["raises"], "with exit status 1 (the disk is full); mend that"),
        ([], "with exit status 7 (997 / 998 / 999); mend that"),
    ],
)
def test_how_a_server_ended_is_said(raises: list[str], words: str) -> None:
    """Of itself, after it had answered: whoever uses it ends too, and says when that was, and why."""
    command = [sys.executable, "-c", _USER, _MORTAL, str(free_port()), *raises]
    child = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert re.match(r"Prefect's server ended at 20\d\d-\S+ \d\d:\d\d:\d\d, 0:00:\d\d after its start", child.stdout)
    assert words in child.stdout


def test_a_taken_port_is_named_before_a_server_starts() -> None:
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        port = somebody.getsockname()[1]
        with pytest.raises(SpecError, match=f"port {port} cannot be had .*PREFECT_API_URL=.*another --prefect-port"):
            serve_pages(Settings(), prefect_port=port, mlflow_port=free_port())
        with pytest.raises(SpecError, match=f"port {port} cannot be had .* choose another --mlflow-port"):
            serve_pages(Settings(), prefect_port=free_port(), mlflow_port=port)


@pytest.mark.server
@pytest.mark.slow
def test_the_pages_leave_nothing_when_a_service_manager_ends_them(prefect_home: Path, tmp_path: Path) -> None:
    home, ports = Home(tmp_path / "home"), (free_port(), free_port())
    log, place = tmp_path / "log", {"PREFECT_HOME": str(prefect_home)}
    given = ["--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    with started(home, log, "flows", "ui", *given, **place) as ui:
        wait_for(lambda: taken(ports[0]), 120, ui)
        wait_for(lambda: any("uvicorn" in line and "mlflow" in line for line in alive_in(home)), 120, ui)
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(SOON) == 0
        assert alive_in(home) == []
        assert not any(map(taken, ports))
    assert "ended by SIGTERM" in log.read_text()


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.server
@pytest.mark.slow
def test_the_temporary_server_of_a_killed_run_ends(prefect_home: Path, tmp_path: Path, offline_root: Path) -> None:
    home = Home.create(tmp_path / "home", offline_root)
    home.variables["PREFECT_HOME"] = str(prefect_home)
    with started(home, tmp_path / "log", "flows", "run", "smoke") as run:
        wait_for(
            lambda: any("create_app" in line and "exit_with_parent" not in line for line in alive_in(home)), 60, run
        )
        run.kill()
        run.wait()
        wait_for(lambda: alive_in(home) == [], SOON)
