"""The command line called in this process, and whether what it said and how it left is allowed."""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

#: seconds that a plan and a run may take, on a machine that has other things to do
_PATIENCE = {"plan": 120.0, "run": 600.0}
#: a sentence that nobody reads to its end
_LONGEST = 2000

_LOG_LINE = re.compile(r"(\d{4}/\d\d/\d\d )?\d\d:\d\d:\d\d ")
_CLASS_NAME = re.compile(r"(?:^|[ (])(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Warning|Interrupt): ")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Answer:
    """How a command left, and what it said."""

    command: str
    code: int | None
    errors: str
    seconds: float
    escaped: str = ""
    """The traceback of an exception that left `main`."""

    @property
    def sentence(self) -> str:
        """The last line of what it said."""
        return self.errors.strip().rpartition("\n")[2]


def slimline(*arguments: str, variables: Mapping[str, str]) -> Answer:
    """Call the command line; what it changes for its own process is changed back."""
    from flows.__main__ import main

    errors, escaped, started = io.StringIO(), "", time.monotonic()
    code: int | None = None
    with _as_before(), redirect_stdout(io.StringIO()), redirect_stderr(errors):
        os.environ.update(variables)
        sys.argv = ["slimline", *arguments]
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            escaped = traceback.format_exc()
    return Answer(arguments[0], code, errors.getvalue(), time.monotonic() - started, escaped)


def fault(answer: Answer) -> str | None:
    """What is not allowed in an answer; None: nothing."""
    if answer.escaped:
        return f"an exception left the command: {answer.escaped}"
    if answer.code not in (0, 2, 3):
        return f"exit code {answer.code}"
    if answer.seconds > _PATIENCE[answer.command]:
        return f"it took {answer.seconds:.0f} s"
    lines = answer.errors.splitlines() if answer.errors else []
    said = [line for line in lines if line.startswith("slimline: ")]
    other = [line for line in lines if line not in said and not _LOG_LINE.match(line)]
    if other:
        return f"a line that is neither log nor complaint: {other[0]!r}"
    if len(said) != (answer.code != 0):
        return f"{len(said)} complaints with exit code {answer.code}"
    if said and not said[0].removeprefix("slimline: ").strip():
        return "an empty complaint"
    for line in lines:
        if "Traceback" in line or _CLASS_NAME.search(line):
            return f"the name of a class: {line!r}"
        if len(line) > _LONGEST:
            return f"a line of {len(line)} characters"
        if _UNPRINTABLE.search(line):
            return f"what no terminal should be sent: {line!r}"
    return None


@contextmanager
def _as_before() -> Iterator[None]:
    from flows.runtime.environment import _silence_interpreter_exit

    logger = logging.getLogger("slimline")
    before = (logger.handlers, logger.propagate, logger.level, dict(os.environ), warnings.filters[:], sys.argv)
    try:
        yield
    finally:
        atexit.unregister(_silence_interpreter_exit)
        logger.handlers, logger.propagate, logger.level = before[:3]
        os.environ.clear()
        os.environ.update(before[3])
        warnings.filters[:] = before[4]
        sys.argv = before[5]
