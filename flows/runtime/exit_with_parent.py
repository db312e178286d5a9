"""Run a command for as long as its parent lives: python exit_with_parent.py SIGNAL COMMAND...

Standard input is a pipe of which the parent, and nobody else, has the other end. When that is closed, by the parent or
by its death (kill -9 included), every process of the command's group is sent SIGNAL, and killed where that is not
enough. So nothing is left behind, and nobody has to guess later to whom a server belongs.

The last lines that the command printed are written to standard error when it has ended, whether that took seconds or
weeks. Needs nothing but Python, so that it starts at once: it is run as a file, not as a part of the package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

#: seconds that the command has to end after it was sent SIGNAL
GRACE = 3.0
#: of the output: lines, and bytes of each (together less than a pipe takes although nobody reads)
_LAST_LINES, _LINE_BYTES = 40, 1000
_FOR_EVERYBODY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str]) -> int:
    """Run the command, and return its exit code."""
    number, command = signal.Signals[arguments[0]], arguments[1:]
    for ignored in _FOR_EVERYBODY:  # terminals and service managers signal all processes; for us the pipe counts
        signal.signal(ignored, signal.SIG_IGN)

    def prepare() -> None:
        for default in _FOR_EVERYBODY:
            signal.signal(default, signal.SIG_DFL)
        # the command survives the signals that its parent gets, until that has no more need of it
        signal.pthread_sigmask(signal.SIG_BLOCK, set(_FOR_EVERYBODY) - {number})

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=prepare,
    )
    lines: deque[bytes] = deque(maxlen=_LAST_LINES)
    reading = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reading.start()
    threading.Thread(target=_end_with_parent, args=(child.pid, number), daemon=True).start()
    code = child.wait()
    _end(child.pid, number)  # the workers of a process that ended before them
    reading.join(GRACE)
    with suppress(OSError):  # the parent is gone
        os.write(2, b"".join(lines))
    return code if code >= 0 else 128 - code


def _read(output: IO[bytes], lines: deque[bytes]) -> None:
    while line := output.readline(_LINE_BYTES):
        lines.append(line)


def _end_with_parent(group: int, number: signal.Signals) -> None:
    while os.read(0, 1024):
        pass
    _end(group, number)


def _end(group: int, number: signal.Signals) -> None:
    """Signal all processes of the group, wait, and kill those that are left."""
    _send(group, number)
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
