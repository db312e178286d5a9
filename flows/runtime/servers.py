"""Prefect's and MLflow's servers for one user on one machine: always bound to the loopback address, never longer there
than the process that started them, and what ended one is said in its own words."""

from __future__ import annotations

import atexit
import http.client
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from flows.errors import PrefectUnusable, SpecError
from flows.runtime import exit_with_parent
from infra.secrets import redacted

if TYPE_CHECKING:
    from infra.settings import Settings

log = logging.getLogger("slimline")

HOST = "127.0.0.1"
#: seconds; a first start creates the database, on a slow disk in half a minute
_PATIENCE = 120.0
#: runs a module that SIGINT ends as SIGTERM would: when uvicorn has shut down, at once; Python's own way takes seconds
_RUN = """import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""
#: our default is silence (flows/runtime/environment.py), and a server that fails must say why
_LOG_ERRORS = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR", "PREFECT_SERVER_LOGGING_LEVEL": "ERROR"}
_TEMPORARY = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
#: MLflow's server has eight processes for jobs about traces, which we have none of
_WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
#: of the last lines of a server's log, in characters
_LAST_WORDS = 400


class Server:
    """A server process that ends when this process does, however that ends, or when `stop` is called; not before.

    It belongs to no terminal, and a signal that is sent to all of our processes ends this one alone. stop_signal: what
    the server takes as the request to shut down.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], stop_signal: str = "SIGINT"):
        self.name = name
        self._started = datetime.now()
        self._ended: datetime | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", exit_with_parent.__file__, stop_signal, *command],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # nothing until the server has ended, then its last lines
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        if self.process.poll() is None:
            return True
        self._ended = self._ended or datetime.now()
        return False

    def stop(self) -> None:
        """End it, and wait for that."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def wait_until_healthy(self, url: str, patience: float) -> bool | None:
        """Whether it answers at that API within so many seconds: False if it ended, None if it does neither."""
        deadline = time.monotonic() + patience
        while not _healthy(url):
            if not self.running:
                return False
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        return True

    def how_it_ended(self) -> str:
        """When `running` first said so, after how long, with what exit status and which last words."""
        assert self._ended is not None
        lived = timedelta(seconds=round((self._ended - self._started).total_seconds()))
        return (
            f"{self.name}'s server ended at {self._ended:%Y-%m-%d %H:%M:%S}, {lived} after its start, with exit "
            f"status {self.process.returncode} ({self.last_words()})"
        )

    def last_words(self) -> str:
        """Of a server that ended: its last exception without the name of the class, or else its last lines."""
        assert self.process.stderr is not None
        with self.process.stderr as output:
            lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
        exceptions = [found.group(1) for line in lines if (found := re.fullmatch(r"[a-zA-Z_][\w.]*: (.+)", line))]
        words = (
            exceptions[-1][:_LAST_WORDS]
            if exceptions
            else " / ".join(line.strip() for line in lines[-3:])[-_LAST_WORDS:]
        )
        return redacted(words) or "it said nothing"


def serve_pages(settings: Settings, *, prefect_port: int, mlflow_port: int) -> None:
    """Run both servers until one ends or the user interrupts. Raises SpecError if a port is taken or a server ends."""
    _refuse_taken_prefect(prefect_port)
    if reason := _taken(mlflow_port):
        raise SpecError(f"port {mlflow_port} cannot be had ({reason}); choose another --mlflow-port")
    mlflow = [f"{os.path.dirname(sys.executable)}/mlflow", "server", "--host", HOST, "--port", str(mlflow_port)]
    # not as an argument: everybody on the machine can read those, and a database's URI may hold a password
    store = {"MLFLOW_BACKEND_STORE_URI": settings.tracking_uri}
    # SIGTERM is what MLflow's server hands on to its workers
    servers = (_start_prefect(prefect_port), Server("MLflow", mlflow, _WITHOUT_JOBS | os.environ | store, "SIGTERM"))
    print(f"Prefect: http://{HOST}:{prefect_port}\nMLflow: http://{HOST}:{mlflow_port}\nCtrl-C ends both", flush=True)
    try:
        while True:
            for server in servers:
                if not server.running:
                    raise SpecError(f"{server.how_it_ended()}; the other one was ended too: start both again")
            time.sleep(0.5)
    finally:
        for server in servers:
            server.stop()


@contextmanager
def prefect_server(port: int) -> Iterator[str]:
    """A Prefect server with its pages while the block lasts; yields the URL of its API.

    Raises SpecError if the port is taken, or if the server does not come up or ends before the block, which is then
    ended by a SIGTERM to this process.
    """
    _refuse_taken_prefect(port)
    server, url, over = _start_prefect(port), f"http://{HOST}:{port}/api", threading.Event()
    try:
        up = server.wait_until_healthy(url, _PATIENCE)
        if up is None:
            raise SpecError(
                f"Prefect's server did not answer at {url} in {_PATIENCE:.0f} s; is this machine very busy?"
            )
        if up:
            threading.Thread(target=_terminate_without, args=(server, over), daemon=True).start()
            try:
                yield url
            except (KeyboardInterrupt, Exception) as error:  # clients cannot reach a server that ended
                if server.running:
                    raise
                log.debug("without Prefect's server", exc_info=error)
            over.set()
        if not server.running:
            raise SpecError(f"{server.how_it_ended()}; mend that, or try: prefect server start")
    finally:
        over.set()
        server.stop()


def _terminate_without(server: Server, over: threading.Event) -> None:
    while not over.wait(1.0):
        if not server.running:
            log.error("Prefect's server has ended, and without it this command ends")
            os.kill(os.getpid(), signal.SIGTERM)
            return


def start_temporary_server() -> None:
    """Start the server that Prefect's clients use where no URL names one, unless it runs. Raises PrefectUnusable.

    Prefect's own would outlive a process that is killed, be signalled by a terminal or a service manager like us (while
    stages that finish still need it), and fail after a time-out without a reason.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

    prefects = SubprocessASGIServer()  # the one of this process, whoever asks for it
    if prefects.running:
        return
    patience = float(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    words = ""
    for _ in range(2):  # somebody else may take the free port before the server does
        port = _free_port()
        server = _start_temporary(port)
        up = server.wait_until_healthy(f"http://{HOST}:{port}/api", patience)
        if up:
            prefects.port, prefects.server_process, prefects.running = port, server.process, True
            atexit.register(server.stop)
            return
        server.stop()
        if up is None:
            raise PrefectUnusable(
                f"Prefect's temporary server was not ready in {patience:.0f} s; if this machine is that busy set "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more, or PREFECT_API_URL to a server that runs"
            )
        words = server.last_words()
        if not _taken(port):
            break  # it would fail again, seconds later
    raise PrefectUnusable(
        f"Prefect's temporary server ended before it was ready ({words}); mend that, or set "
        "PREFECT_API_URL to a server that runs"
    )


def _start_temporary(port: int) -> Server:
    """As Prefect does it: without pages, and with those of its services alone that a single run needs."""
    import prefect
    from prefect.settings import get_current_settings

    app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
    command = [sys.executable, "-c", _RUN, "uvicorn", *app, "--host", HOST, "--port", str(port)]
    command += ["--log-level", "error", "--lifespan", "on"]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    return Server("Prefect", command, os.environ | _TEMPORARY | settings | _LOG_ERRORS)


def _start_prefect(port: int) -> Server:
    command = [sys.executable, "-c", _RUN, "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    variables = {"PREFECT_UI_API_URL": f"http://{HOST}:{port}/api"} | _LOG_ERRORS
    return Server("Prefect", command, os.environ | variables)


def _refuse_taken_prefect(port: int) -> None:
    if reason := _taken(port):
        raise SpecError(
            f"port {port} cannot be had ({reason}); if a Prefect server runs there, use it with "
            f"PREFECT_API_URL=http://{HOST}:{port}/api, otherwise choose another --prefect-port"
        )


def _taken(port: int) -> str | None:
    """Why no server could be started there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    try:
        with direct.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (http.client.HTTPException, OSError):
        return False
