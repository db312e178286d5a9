"""A killed run's temporary Prefect server is ended by the next run, and nobody else's is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.orphans import end_orphaned_servers

pytestmark = pytest.mark.skipif(not Path("/proc/1/cmdline").exists(), reason="needs /proc")

# the second word of the command line is what tells a Prefect server
_SERVER = [sys.executable, "-c", "import time; time.sleep(60)", "prefect.server.api.server:create_app"]
_RUN = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(60)"


def _start_run(storage: Path) -> tuple[subprocess.Popen[str], int]:
    environment = os.environ | {"PREFECT_LOCAL_STORAGE_PATH": str(storage)}
    run = subprocess.Popen([sys.executable, "-c", _RUN, *_SERVER], env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    return run, int(run.stdout.readline())


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_server_of_a_killed_run_is_ended(tmp_path: Path) -> None:
    run, server = _start_run(tmp_path)
    try:
        assert end_orphaned_servers(str(tmp_path)) == 0, "its run is alive"
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert _alive(server)
        if int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1]) != 1:
            pytest.skip("orphans are not adopted by process 1 here")
        assert end_orphaned_servers(str(tmp_path / "another")) == 0
        assert end_orphaned_servers(str(tmp_path)) == 1
        deadline = time.monotonic() + 10
        while _alive(server) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(server)
    finally:
        run.kill()
        if _alive(server):
            os.kill(server, signal.SIGKILL)
