"""Prefect's and MLflow's servers for one user on one machine: always bound to the loopback address, and never longer
there than whoever started them."""

from __future__ import annotations

import atexit
import http.client
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flows import tethered
from flows.errors import SpecError
from infra.settings import Settings

log = logging.getLogger("slimline")

_HOST = "127.0.0.1"
#: a first start creates the database, on a slow disk in half a minute
_PATIENCE = 120.0
#: runs a module that SIGINT ends as SIGTERM would: when uvicorn has shut down, at once; Python's own way takes seconds
_RUN = """import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""


def serve_pages(settings: Settings, *, prefect_port: int, mlflow_port: int) -> None:
    """Run both servers until one ends or the user interrupts; bound to the loopback address.

    Raises SpecError when a server ends by itself (its port is taken, most often).
    """
    mlflow = [_script("mlflow"), "server", "--host", _HOST, "--port", str(mlflow_port)]
    # not as an argument: everybody on the machine can read those, and a database's URI may hold a password
    store = {"MLFLOW_BACKEND_STORE_URI": settings.tracking_uri}
    ports = {"Prefect": prefect_port, "MLflow": mlflow_port}
    # SIGTERM is what MLflow's server hands on to its workers
    running = {"Prefect": _start_prefect(prefect_port), "MLflow": _start(mlflow, os.environ | store, told="SIGTERM")}
    print(
        "\n".join(f"{name}: http://{_HOST}:{port}" for name, port in ports.items()) + "\nCtrl-C ends both", flush=True
    )
    try:
        while True:
            for name, process in running.items():
                if process.poll() is not None:
                    raise SpecError(f"{name} ended at once; is port {ports[name]} taken? choose another one")
            time.sleep(0.5)
    finally:
        _end(*running.values())


@contextmanager
def prefect_server(port: int) -> Iterator[str]:
    """A Prefect server with its pages while the block lasts; yields the URL of its API.

    Raises SpecError if the port is taken or the server does not come up.
    """
    _refuse_taken(port)
    server = _start_prefect(port)
    try:
        url = f"http://{_HOST}:{port}/api"
        _wait_until_healthy(url, server)
        yield url
    finally:
        _end(server)


def ensure_prefect_server() -> None:
    """Where no server is configured, start the temporary one that Prefect would start, tethered to this process.

    Prefect's own would outlive a process that is killed, and be told by a terminal or a service manager what only this
    process is to hear: stages that finish need the server as much as the record does. Raises SpecError.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED

    if PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return
    from prefect.server.api.server import SubprocessASGIServer

    ours = SubprocessASGIServer()  # the one of this process, whoever asks for it
    if ours.running:
        return
    port = _free_port()
    server = _start_temporary(port)
    _wait_until_healthy(f"http://{_HOST}:{port}/api", server)
    ours.port, ours.server_process, ours.running = port, server, True
    atexit.register(_end, server)


def _start_prefect(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _RUN, "prefect", "server", "start", "--host", _HOST, "--port", str(port)]
    return _start(command, os.environ | {"PREFECT_UI_API_URL": f"http://{_HOST}:{port}/api"})


def _start_temporary(port: int) -> subprocess.Popen[bytes]:
    """As Prefect does it: without pages, and with those of its services alone that a single run needs."""
    import prefect
    from prefect.settings import get_current_settings

    app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
    command = [sys.executable, "-c", _RUN, "uvicorn", *app, "--host", _HOST, "--port", str(port)]
    command += ["--log-level", "error", "--lifespan", "on"]
    kind = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    return _start(command, os.environ | kind | get_current_settings().to_environment_variables(exclude_unset=True))


def _start(command: list[str], environment: Mapping[str, str], *, told: str = "SIGINT") -> subprocess.Popen[bytes]:
    """Start a server that ends, told so by that signal, with this process or when `_end` is called, not before.

    So it is not of any terminal, and a signal that is sent to all of our processes ends this one alone.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", tethered.__file__, told, *command],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(*servers: subprocess.Popen[bytes]) -> None:
    for server in servers:
        assert server.stdin is not None
        server.stdin.close()
    for server in servers:
        server.wait()


def _script(name: str) -> str:
    return f"{os.path.dirname(sys.executable)}/{name}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise SpecError(
                f"port {port} cannot be had ({error.strerror}); if a Prefect server runs there, use it with "
                f"PREFECT_API_URL=http://{_HOST}:{port}/api, otherwise choose another --prefect-port"
            ) from error


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not _healthy(url):
        if server.poll() is not None:
            raise SpecError(
                f"Prefect's server ended at once (exit code {server.returncode}); try: prefect server start"
            )
        if time.monotonic() > deadline:
            raise SpecError(
                f"Prefect's server did not answer at {url} in {_PATIENCE:.0f} s; is this machine very busy?"
            )
        time.sleep(0.2)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False
