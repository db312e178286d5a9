"""`slimline serve` as a child process, and the API of a Prefect server that is not this process's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command_line import PROJECT
from tests.flows.home import Home

#: every service of Prefect's looks as often as it may
IMPATIENT = {
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
    "PREFECT_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
}


@dataclass(frozen=True)
class Api:
    """The little of Prefect's API that tests ask for."""

    url: str

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/{path}", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        content = _answer(request)
        return json.loads(content) if content else None

    def delete(self, path: str) -> None:
        _answer(urllib.request.Request(f"{self.url}/{path}", method="DELETE"))

    def flow_runs(self, **state: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.post("flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 50} | state)
        return found

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        (found,) = self.flow_runs(flow_runs={"id": {"any_": [flow_run_id]}})
        return found

    def state(self, flow_run_id: str) -> str:
        return str(self.flow_run(flow_run_id)["state_type"])

    def retry(self, flow_run_id: str) -> None:
        """What the retry button of Prefect's pages does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the Prefect UI"}
        self.post(f"flow_runs/{flow_run_id}/set_state", {"state": state, "force": True})


def _answer(request: urllib.request.Request, patience: float = 10.0) -> bytes:
    """Asked again while others of this test run have the server's database locked, which it calls unavailable."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content: bytes = answer.read()
            return content
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], Any], seconds: float, process: subprocess.Popen[str] | None = None) -> Any:
    """The first answer that is not false."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert process is None or process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.2)
    return answer


@contextmanager
def started(home: Home, log: Path, *command: str, **variables: str | None) -> Iterator[subprocess.Popen[str]]:
    """A module with its output in a file; a variable that is None is not set. Of our own SIGINT is ignored, as in a
    shell's background: SIGTERM must be enough."""
    environment: dict[str, str | None] = home.environment | IMPATIENT | variables
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=PROJECT,
            env={name: value for name, value in environment.items() if value is not None},
            stdout=sink,
            stderr=sink,
            text=True,
            preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if command[0] == "flows" else None,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        finally:
            process.kill()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def server_of_the_users_own(home: Home) -> Iterator[int]:
    """`prefect server start --background` where PREFECT_LOCAL_STORAGE_PATH is exported: its parent is gone as well, and
    a run's own server looks the same. Yields its process id."""
    words = ["prefect.server.api.server:create_app", "--port", home.api_url]
    code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid)"
    command = [sys.executable, "-c", code, sys.executable, "-c", "import time; time.sleep(600)", *words]
    started = subprocess.run(command, env=home.environment, stdout=subprocess.PIPE, text=True, check=True)
    try:
        yield int(started.stdout)
    finally:
        os.kill(int(started.stdout), signal.SIGKILL)


def alive_in(home: Home) -> list[str]:
    """Command lines of processes that have this home in their environment."""
    mark = f"SLIMLINE_HOME={home.folder}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]
