"""The temporary server that a run has where no other is configured: the one that Prefect would start, but tethered to
this process, and one that does not come up says why, and at once.

Prefect's own would outlive a process that is killed, be told by a terminal or a service manager what only this process
is to hear (stages that finish need the server as much as the record does), and fail after a time-out without a reason.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import subprocess
import sys
import tempfile
from typing import IO

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, get_current_settings

from flows.errors import PrefectUnusable
from flows.runtime.servers import HOST, RUN, comes_up, end, start
from infra.secrets import redacted

_KIND = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
#: we have it silent (flows/runtime/environment.py) unless we want to know
_OUTSPOKEN = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR", "PREFECT_SERVER_LOGGING_LEVEL": "ERROR"}
#: of what a server said before it ended, in characters
_LAST_WORDS = 400


def start_temporary_server() -> None:
    """Start the server that Prefect's clients use where no URL names one, unless it runs. Raises PrefectUnusable."""
    ours = SubprocessASGIServer()  # the one of this process, whoever asks for it
    if ours.running:
        return
    patience = float(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    # twice: its port may be taken by somebody else meanwhile; the second time it may speak
    with tempfile.TemporaryFile() as said:
        for errors in (None, said):
            port = _free_port()
            server = _start(port, errors)
            up = comes_up(f"http://{HOST}:{port}/api", server, patience)
            if up:
                ours.port, ours.server_process, ours.running = port, server, True
                atexit.register(end, server)
                return
            end(server)
            if up is None:
                raise PrefectUnusable(
                    f"Prefect's temporary server was not ready in {patience:.0f} s; if this machine is that busy set "
                    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more, or PREFECT_API_URL to a server that runs"
                )
        raise PrefectUnusable(
            f"Prefect's temporary server ended before it was ready ({_last_words(said)}); mend that, or set "
            "PREFECT_API_URL to a server that runs"
        )


def _start(port: int, errors: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """As Prefect does it: without pages, and with those of its services alone that a single run needs."""
    app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
    command = [sys.executable, "-c", RUN, "uvicorn", *app, "--host", HOST, "--port", str(port)]
    command += ["--log-level", "error", "--lifespan", "on"]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    return start(command, os.environ | _KIND | settings | (_OUTSPOKEN if errors else {}), errors=errors)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _last_words(file: IO[bytes]) -> str:
    """What ended the server: its last exception without the name of the class, or else its last line."""
    file.seek(0)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    exceptions = [found.group(1) for line in lines if (found := re.fullmatch(r"[a-zA-Z_][\w.]*: (.+)", line))]
    words = exceptions[-1] if exceptions else lines[-1] if lines else "it said nothing"
    return redacted(words[:_LAST_WORDS])
