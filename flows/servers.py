"""`slimline ui`: Prefect's and MLflow's pages, on this machine only."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from flows.errors import SpecError
from infra.settings import Settings

_HOST = "127.0.0.1"


def serve_pages(settings: Settings, *, prefect_port: int, mlflow_port: int) -> None:
    """Run both servers until one ends or the user interrupts; bound to the loopback address.

    Raises SpecError when a server ends by itself (its port is taken, most often).
    """
    environment = os.environ | {"PREFECT_UI_API_URL": f"http://{_HOST}:{prefect_port}/api"}
    scripts = os.path.dirname(sys.executable)
    commands = {
        "Prefect": [f"{scripts}/prefect", "server", "start", "--host", _HOST, "--port", str(prefect_port)],
        "MLflow": [
            *(f"{scripts}/mlflow", "server", "--host", _HOST, "--port", str(mlflow_port)),
            *("--backend-store-uri", settings.tracking_uri),
        ],
    }
    ports = {"Prefect": prefect_port, "MLflow": mlflow_port}
    running = {
        name: subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, command in commands.items()
    }
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
