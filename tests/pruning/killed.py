"""Calls that are expected to be killed: each in a fork of one process that has imported what they need, once."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def exit_code(function: str, *arguments: str, imports: tuple[str, ...] = ()) -> int:
    """Call `module:function` with these strings in a process of its own; negative for the signal that killed it.

    imports: modules that it imports while it runs, so that its forks need not.
    """
    nursery = _nursery()
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    print(",".join(imports), function, *arguments, sep="\t", file=nursery.stdin, flush=True)
    return int(nursery.stdout.readline())


def kill_this_process() -> None:
    """As kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


@cache
def _nursery() -> subprocess.Popen[str]:
    """Ends when this process does, and with it its standard input."""
    command = [sys.executable, "-c", "from tests.pruning.killed import serve; serve()"]
    return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve() -> None:
    """Fork for every line of standard input. This process itself computes nothing: torch's threads survive no fork."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        imports, function, *arguments = line.rstrip("\n").split("\t")
        for module in filter(None, imports.split(",")):
            importlib.import_module(module)
        module, _, name = function.partition(":")
        call = getattr(importlib.import_module(module), name)
        if not (child := os.fork()):
            code = 0
            try:
                call(*arguments)
            except BaseException:
                traceback.print_exc()
                code = 1
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
