"""Run a command for as long as its starter lives: python tethered.py SIGNAL COMMAND...

Standard input is a pipe of which the starter, and nobody else, has the other end. When that is closed, by the starter
or by its death (kill -9 included), every process of the command's group is sent SIGNAL, and killed where that is not
enough. So nothing is left behind, and nobody has to guess later to whom a server belongs.

Needs nothing but Python, so that it is there at once: it is run as a file, not as a part of the package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

#: seconds that the command has to end after it was told to
GRACE = 3.0
_EVERYBODYS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str]) -> int:
    """Run the command, and return its exit code."""
    told, command = signal.Signals[arguments[0]], arguments[1:]
    for number in _EVERYBODYS:  # a terminal and a service manager tell all processes at once; we hear of it by the pipe
        signal.signal(number, signal.SIG_IGN)

    def prepare() -> None:
        for number in _EVERYBODYS:
            signal.signal(number, signal.SIG_DFL)
        # the command outlasts what its starter is told, until that has no more need of it
        signal.pthread_sigmask(signal.SIG_BLOCK, set(_EVERYBODYS) - {told})

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare)
    threading.Thread(target=_end_with_starter, args=(child.pid, told), daemon=True).start()
    code = child.wait()
    _end(child.pid, told)  # the workers of a parent that ended before them
    return code if code >= 0 else 128 - code


def _end_with_starter(group: int, told: signal.Signals) -> None:
    while os.read(0, 1024):
        pass
    _end(group, told)


def _end(group: int, told: signal.Signals) -> None:
    """Tell all processes of the group, wait, and kill those that are left."""
    _send(group, told)
    deadline = time.monotonic() + GRACE
    while _send(group, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    _send(group, signal.SIGKILL)


def _send(group: int, number: int) -> bool:
    """Whether there was anybody to send it to."""
    try:
        os.killpg(group, number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
