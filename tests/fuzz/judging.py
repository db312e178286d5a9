"""Whether what the command line said and how it left is allowed."""

from __future__ import annotations

import re

from tests.command_line import Answer

#: seconds that a plan and a run may take, on a machine that has other things to do
_PATIENCE = {"plan": 120.0, "run": 600.0}
#: a sentence that nobody reads to its end
_LONGEST = 2000

_LOG_LINE = re.compile(r"(\d{4}/\d\d/\d\d )?\d\d:\d\d:\d\d ")
_CLASS_NAME = re.compile(r"(?:^|[ (])(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Warning|Interrupt): ")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


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
