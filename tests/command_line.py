"""The command line called in this process: a child spends seconds on importing torch, Prefect and MLflow."""

from __future__ import annotations

import atexit
import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Answer:
    """How a command left, and what it said."""

    command: str
    code: int | None
    output: str
    errors: str
    seconds: float
    escaped: str = ""
    """The traceback of an exception that left `main`."""

    @property
    def sentence(self) -> str:
        """The last line of what it said."""
        return self.errors.strip().rpartition("\n")[2]


def call(*arguments: str, variables: Mapping[str, str]) -> Answer:
    """Call `slimline` in the project's folder, as a child would be; what it changes for its process is changed back."""
    from flows.__main__ import main

    output, errors, escaped, started = io.StringIO(), io.StringIO(), "", time.monotonic()
    code: int | None = None
    with _as_before(), chdir(PROJECT), redirect_stdout(output), redirect_stderr(errors):
        os.environ.update(variables)
        sys.argv = ["slimline", *arguments]
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            escaped = traceback.format_exc()
    return Answer(arguments[0], code, output.getvalue(), errors.getvalue(), time.monotonic() - started, escaped)


@contextmanager
def _as_before() -> Iterator[None]:
    from flows.runtime import interrupts
    from flows.runtime.environment import _silence_interpreter_exit

    logger = logging.getLogger("slimline")
    before = (logger.handlers, logger.propagate, logger.level, warnings.filters[:])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        with (
            mock.patch.dict(os.environ),
            mock.patch.object(sys, "argv", sys.argv),
            mock.patch.multiple(interrupts, _first=None, _first_at=0.0, _in_command=False),
        ):
            yield
    finally:
        atexit.unregister(_silence_interpreter_exit)
        logger.handlers, logger.propagate, logger.level = before[:3]
        warnings.filters[:] = before[3]
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
