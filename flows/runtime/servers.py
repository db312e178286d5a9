"""Prefect's and MLflow's servers for one user on one machine: always bound to the loopback address, and never longer
there than whoever started them."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

from flows.errors import SpecError
from flows.runtime import tethered
from infra.settings import Settings

log = logging.getLogger("slimline")

HOST = "127.0.0.1"
#: a first start creates the database, on a slow disk in half a minute
_PATIENCE = 120.0
#: runs a module that SIGINT ends as SIGTERM would: when uvicorn has shut down, at once; Python's own way takes seconds
RUN = """import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""


def serve_pages(settings: Settings, *, prefect_port: int, mlflow_port: int) -> None:
    """Run both servers until one ends or the user interrupts; bound to the loopback address.

    Raises SpecError when a server ends by itself (its port is taken, most often).
    """
    mlflow = [_script("mlflow"), "server", "--host", HOST, "--port", str(mlflow_port)]
    # not as an argument: everybody on the machine can read those, and a database's URI may hold a password
    store = {"MLFLOW_BACKEND_STORE_URI": settings.tracking_uri}
    ports = {"Prefect": prefect_port, "MLflow": mlflow_port}
    # SIGTERM is what MLflow's server hands on to its workers
    running = {"Prefect": _start_prefect(prefect_port), "MLflow": start(mlflow, os.environ | store, told="SIGTERM")}
    print("\n".join(f"{name}: http://{HOST}:{port}" for name, port in ports.items()) + "\nCtrl-C ends both", flush=True)
    try:
        while True:
            for name, process in running.items():
                if process.poll() is not None:
                    raise SpecError(f"{name} ended at once; is port {ports[name]} taken? choose another one")
            time.sleep(0.5)
    finally:
        end(*running.values())


@contextmanager
def prefect_server(port: int) -> Iterator[str]:
    """A Prefect server with its pages while the block lasts; yields the URL of its API.

    Raises SpecError if the port is taken or the server does not come up.
    """
    _refuse_taken(port)
    server = _start_prefect(port)
    try:
        url = f"http://{HOST}:{port}/api"
        up = comes_up(url, server, _PATIENCE)
        if up is None:
            raise SpecError(
                f"Prefect's server did not answer at {url} in {_PATIENCE:.0f} s; is this machine very busy?"
            )
        if not up:
            raise SpecError(
                f"Prefect's server ended at once (exit code {server.returncode}); try: prefect server start"
            )
        yield url
    finally:
        end(server)


def _start_prefect(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN, "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return start(command, os.environ | {"PREFECT_UI_API_URL": f"http://{HOST}:{port}/api"})


def start(
    command: list[str], environment: Mapping[str, str], *, told: str = "SIGINT", errors: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a server that ends, told so by that signal, with this process or when `end` is called, not before.

    So it is not of any terminal, and a signal that is sent to all of our processes ends this one alone. errors: a file
    for what it says.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", tethered.__file__, told, *command],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors or subprocess.DEVNULL,
        start_new_session=True,
    )


def end(*servers: subprocess.Popen[bytes]) -> None:
    """End servers that were started here, and wait for them."""
    for server in servers:
        assert server.stdin is not None
        server.stdin.close()
    for server in servers:
        server.wait()


def _script(name: str) -> str:
    return f"{os.path.dirname(sys.executable)}/{name}"


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise SpecError(
                f"port {port} cannot be had ({error.strerror}); if a Prefect server runs there, use it with "
                f"PREFECT_API_URL=http://{HOST}:{port}/api, otherwise choose another --prefect-port"
            ) from error


def comes_up(url: str, server: subprocess.Popen[bytes], patience: float) -> bool | None:
    """Whether a server answers at that API before the time is over: False if it ended, None if it does neither."""
    deadline = time.monotonic() + patience
    while not _healthy(url):
        if server.poll() is not None:
            return False
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return True


def _healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    try:
        with direct.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (http.client.HTTPException, OSError):
        return False
