"""Real child processes for tests: what is promised about kill -9 and about two processes at once is tried out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A Python process that runs `code` from the project's root with `arguments` in sys.argv[1:]."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> str:
    """Wait for the child, demand success, return what it printed."""
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return output.strip()


def kill_after_line(child: subprocess.Popen[str]) -> str:
    """kill -9 the child as soon as it has printed a line; returns the line."""
    assert child.stdout is not None
    line = child.stdout.readline().strip()
    child.kill()
    _, errors = child.communicate(timeout=60)
    assert line, errors
    return line
