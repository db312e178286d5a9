"""Prefect's and MLflow's servers for one user on one machine: always bound to the loopback address."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from flows.errors import SpecError
from infra.settings import Settings

log = logging.getLogger("slimline")

_HOST = "127.0.0.1"
#: a first start creates the database, on a slow disk in half a minute
_PATIENCE = 120.0
#: by this the next run knows a server that was left behind; see flows/orphans.py
STARTED_BY_US = {"PREFECT__STARTED_BY": "slimline"}


def serve_pages(settings: Settings, *, prefect_port: int, mlflow_port: int) -> None:
    """Run both servers until one ends or the user interrupts; bound to the loopback address.

    Raises SpecError when a server ends by itself (its port is taken, most often).
    """
    mlflow = [_script("mlflow"), "server", "--host", _HOST, "--port", str(mlflow_port)]
    # not as an argument: everybody on the machine can read those, and a database's URI may hold a password
    store = {"MLFLOW_BACKEND_STORE_URI": settings.tracking_uri}
    ports = {"Prefect": prefect_port, "MLflow": mlflow_port}
    running = {"Prefect": _start_prefect(prefect_port), "MLflow": _start(mlflow, os.environ | store)}
    print("\n".join(f"{name}: http://{_HOST}:{port}" for name, port in ports.items()) + "\nCtrl-C ends both")
    try:
        while True:
            for name, process in running.items():
                if process.poll() is not None:
                    raise SpecError(f"{name} ended at once; is port {ports[name]} taken? choose another one")
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


@contextmanager
def prefect_server(port: int) -> Iterator[str]:
    """A Prefect server with its pages while the block lasts; yields the URL of its API.

    It has a session of its own, so that Ctrl-C reaches whoever uses it first. Raises SpecError if the port is taken or
    the server does not come up.
    """
    _refuse_taken(port)
    server = _start_prefect(port, own_session=True)
    try:
        url = f"http://{_HOST}:{port}/api"
        _wait_until_healthy(url, server)
        yield url
    finally:
        _end(server)


def _start_prefect(port: int, *, own_session: bool = False) -> subprocess.Popen[bytes]:
    command = [_script("prefect"), "server", "start", "--host", _HOST, "--port", str(port)]
    pages = {"PREFECT_UI_API_URL": f"http://{_HOST}:{port}/api"}
    return _start(command, os.environ | STARTED_BY_US | pages, own_session=own_session)


def _start(command: list[str], environment: dict[str, str], *, own_session: bool = False) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=own_session,
    )


def _script(name: str) -> str:
    return f"{os.path.dirname(sys.executable)}/{name}"


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


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
