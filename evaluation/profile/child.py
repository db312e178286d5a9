"""A figure that is taken in a process of its own: that of `python -m <module>`, which prints it as its last line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from evaluation.errors import EvaluationError

_ROOT = Path(__file__).resolve().parents[2]


def last_line_of(module: str, arguments: list[str], what: str) -> str:
    """Run a module of ours and return the last line that it prints. what: begins the sentence if it fails.

    Raises EvaluationError with the last words of a process that fails.
    """
    # our end of the pipe is closed when this process ends, however it does, and the child reads that
    theirs, ours = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdin=theirs, cwd=_ROOT, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
    finally:
        os.close(theirs)
        os.close(ours)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EvaluationError(f"{what} could not be measured: {words[-1]}")
    return done.stdout.splitlines()[-1]


def end_with_parent() -> None:
    """Called in the child: Ctrl-C is the parent's affair; when it is gone, however it went, standard input ends and
    this process too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
