"""Prefect's temporary server, started so that one that does not come up says why, and at once: Prefect itself waits for
its time-out and says that there was one."""

from __future__ import annotations

import atexit
import http.client
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, get_current_settings

from flows.errors import PrefectUnusable
from infra.secrets import redacted

#: of what a server said before it ended, in characters
_LAST_WORDS = 400
#: seconds that a server which ends gets to end once more
_PATIENCE = 60.0
#: as we start servers they are silent (flows/environment.py)
_OUTSPOKEN = {"PREFECT_SERVER_LOGGING_LEVEL": "ERROR", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR"}


def start_temporary_server() -> None:
    """Start the server that Prefect's clients use where no URL names one, unless it runs. Raises PrefectUnusable."""
    _Server().start()


def last_words() -> str:
    """Why Prefect's server ends before it is ready, in its words: asked of one that is started for that."""
    app = [
        "--app-dir",
        str(Path(str(prefect.__file__)).parents[1]),
        "--factory",
        "prefect.server.api.server:create_app",
    ]
    command = [sys.executable, "-m", "uvicorn", *app, "--host", "127.0.0.1", "--port", "0", "--log-level", "error"]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    environment = os.environ | settings | {"PREFECT__SERVER_EPHEMERAL": "1"} | _OUTSPOKEN
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return "the next one did come up"
    lines = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
    exceptions = [found.group(1) for line in lines if (found := re.fullmatch(r"[a-zA-Z_][\w.]*: (.+)", line))]
    words = exceptions[-1] if exceptions else lines[-1] if lines else f"exit code {ended.returncode}"
    return redacted(words[:_LAST_WORDS])


class _Server(SubprocessASGIServer):
    """The one of this process: Prefect's class keeps it when it is made, and every client of Prefect finds it there."""

    def start(self, timeout: int | None = None) -> None:
        """Return when it answers. Raises PrefectUnusable with its last words if it ended, or after the time-out."""
        if self.running:
            return
        self.port = self.find_available_port()
        self.server_process = process = self._run_uvicorn_command()
        atexit.register(self.stop)
        patience = timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        deadline = time.monotonic() + patience
        while not _answers(f"{self.api_url}/health"):
            if process.poll() is not None:
                raise PrefectUnusable(
                    f"Prefect's temporary server ended before it was ready ({last_words()}); mend that and run "
                    "again, or set PREFECT_API_URL to a server that runs"
                )
            if time.monotonic() > deadline:
                raise PrefectUnusable(
                    f"Prefect's temporary server was not ready in {patience:.0f} s; if this machine is that busy set "
                    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more, or PREFECT_API_URL to a server that runs"
                )
            time.sleep(0.1)
        self.running = True


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    try:
        with direct.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False
