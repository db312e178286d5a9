"""Ctrl-C and the signals of service managers and terminals: once lets what runs come to an end, twice drops it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_CHILD = """
import time
from flows.runtime.interrupts import interruptible_command
with interruptible_command():
    try:
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        print("finishing", flush=True)
        time.sleep({seconds})
        print("finished", flush=True)
"""
_SAYS = {
    signal.SIGINT: "slimline: interrupted; running stages are finished first (Ctrl-C again drops them)",
    signal.SIGTERM: "slimline: ended by SIGTERM; running stages end as soon as they can go on from there",
    signal.SIGHUP: "slimline: ended by SIGHUP; running stages end as soon as they can go on from there",
}


@pytest.mark.parametrize(
    ("number", "seconds", "again", "told"),
    [(signal.SIGINT, 0, False, "finished\n"), (signal.SIGINT, 30, True, ""),
     (signal.SIGTERM, 0, False, "finished\n"), (signal.SIGHUP, 30, True, "")],
)  # fmt: skip
def test_first_waits_second_drops(number: signal.Signals, seconds: int, again: bool, told: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD.format(seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.stdout.readline() == "finishing\n"
    if again:
        child.send_signal(number)
    assert child.stderr is not None
    out, err = child.stdout.read(), child.stderr.read()  # not communicate: it forgets what readline read ahead
    child.wait(timeout=20)
    assert out == told
    assert _SAYS[number] in err
    assert "the same command goes on from there" in err
    assert child.returncode == (1 if again else 0)


def test_what_runs_under_nohup_outlives_its_terminal() -> None:
    code = "import os, signal\nfrom flows.runtime.interrupts import interruptible_command\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "with interruptible_command(): os.kill(os.getpid(), signal.SIGHUP)"
    subprocess.run([sys.executable, "-c", code], check=True)
