"""Ctrl-C once finishes what runs, twice drops it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from flows.interrupt import shield_server

_CHILD = """
import time
from flows.interrupt import take_interrupts
take_interrupts()
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    print("finishing", flush=True)
    time.sleep({seconds})
    print("finished", flush=True)
"""


@pytest.mark.parametrize(("seconds", "again", "told"), [(0, False, "finished\n"), (30, True, "")])
def test_first_waits_second_drops(seconds: int, again: bool, told: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD.format(seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "finishing\n"
    if again:
        child.send_signal(signal.SIGINT)
    assert child.stderr is not None
    out, err = child.stdout.read(), child.stderr.read()  # not communicate: it forgets what readline read ahead
    child.wait(timeout=20)
    assert out == told
    assert "the same command goes on from there" in err
    assert child.returncode == (1 if again else 0)


def test_the_temporary_server_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started by the first client; what it is told in a terminal is also told to us."""
    children = []

    def start() -> None:
        children.append(subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1)"],
                                         stdout=subprocess.PIPE))  # fmt: skip

    monkeypatch.setattr("flows.prefect_access.reach_prefect", start)
    shield_server()
    (server,) = children
    assert server.stdout.read(2) == b"up"
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=20) == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
