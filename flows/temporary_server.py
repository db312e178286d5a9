"""Prefect's temporary server, started so that one that does not come up says why, and at once: Prefect itself waits for
its time-out and says that there was one."""

from __future__ import annotations

import atexit
import http.client
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_LOGGING_LEVEL,
    temporary_settings,
)

from flows.errors import PrefectUnusable
from infra.secrets import redacted

_CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
#: of what a server said before it ended, in characters
_LAST_WORDS = 400


def start_temporary_server() -> None:
    """Start the server that Prefect's clients use where no URL names one, unless it runs. Raises PrefectUnusable."""
    _Server().start()


class _Server(SubprocessASGIServer):
    """The one of this process: Prefect's class keeps it when it is made, and every client of Prefect finds it there."""

    def start(self, timeout: int | None = None) -> None:
        """Return when it answers. Raises PrefectUnusable with its last words if it ended, or after the time-out."""
        if self.running:
            return
        patience = timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        atexit.register(self.stop)
        self.port = self.find_available_port()
        self.server_process = self._run_uvicorn_command()
        if not self._comes_up(patience):
            # once more, perhaps its port was taken; this time it may speak
            self.port = self.find_available_port()
            with tempfile.TemporaryFile() as said:
                with _outspoken(said):
                    self.server_process = self._run_uvicorn_command()
                if not self._comes_up(patience):
                    raise PrefectUnusable(
                        f"Prefect's temporary server ended before it was ready ({_last_words(said)}); mend that, or "
                        "set PREFECT_API_URL to a server that runs"
                    )
        self.running = True

    def _comes_up(self, patience: float) -> bool:
        """Whether it answers; False if it ended. Raises PrefectUnusable if it does neither."""
        process = self.server_process
        assert process is not None, "it was started"
        deadline = time.monotonic() + patience
        while process.poll() is None:
            if _answers(f"{self.api_url}/health"):
                return True
            if time.monotonic() > deadline:
                self.stop()
                raise PrefectUnusable(
                    f"Prefect's temporary server was not ready in {patience:.0f} s; if this machine is that busy set "
                    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more, or PREFECT_API_URL to a server that runs"
                )
            time.sleep(0.1)
        return False


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    try:
        with direct.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def _outspoken(file: IO[bytes]) -> Iterator[None]:
    """A server that is started in this block says its errors, into the file; we have it silent (flows/environment.py).

    Its logging reads the environment, and Prefect hands it the settings of this process.
    """
    sys.stderr.flush()
    before, level = os.dup(2), os.environ.get(_CONSOLE_LEVEL)
    os.dup2(file.fileno(), 2)
    os.environ[_CONSOLE_LEVEL] = "ERROR"
    try:
        with temporary_settings({PREFECT_SERVER_LOGGING_LEVEL: "ERROR"}):
            yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.environ.pop(_CONSOLE_LEVEL)
        if level is not None:
            os.environ[_CONSOLE_LEVEL] = level


def _last_words(file: IO[bytes]) -> str:
    """What ended the server: its last exception without the name of the class, or else its last line."""
    file.seek(0)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    exceptions = [found.group(1) for line in lines if (found := re.fullmatch(r"[a-zA-Z_][\w.]*: (.+)", line))]
    words = exceptions[-1] if exceptions else lines[-1] if lines else "it said nothing"
    return redacted(words[:_LAST_WORDS])
