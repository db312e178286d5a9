"""Throw as many cases as wanted and print every answer that is not allowed: python -m tests.fuzz 2000 [KIND ...]"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# a machine of its own, before anything reads the environment
from tests.conftest import pytest_unconfigure as remove_scratch

from hypothesis import HealthCheck, Phase, given, seed, settings  # isort: skip
from hypothesis import strategies as st  # isort: skip

from tests.flows.home import Home  # isort: skip
from tests.command_line import call  # isort: skip
from tests.fuzz.judging import fault  # isort: skip
from tests.fuzz.throwing import KINDS  # isort: skip


def main() -> int:
    """1 if anything was not allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", type=int, help="cases of each kind")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    asked = parser.parse_args()
    _say(f"--seed {asked.seed}")
    with tempfile.TemporaryDirectory(prefix="slimline-fuzz-") as scratch, _lived_in(Path(scratch)):
        found = [throw(kind, Path(scratch), asked.examples, asked.seed) for kind in asked.kinds or KINDS]
    return 1 if any(found) else 0


def throw(kind: str, scratch: Path, examples: int, chosen_seed: int) -> int:
    """Print each different wrong answer once; returns how many there were."""
    codes: Counter[int | None] = Counter()
    found: set[tuple[str, str]] = set()

    @seed(chosen_seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def case_after_case(data: Any) -> None:
        case = KINDS[kind](data.draw, scratch, scratch / "offline/slimline/tiny-random-llama")
        answer = call(*case.arguments, variables=case.variables)
        codes[answer.code] += 1
        wrong = fault(answer)
        alike = (str(wrong)[:60], answer.sentence[:80])
        if wrong and alike not in found:
            found.add(alike)
            _say(f"{kind}: {case.said[:300]!r}\n    {wrong[-600:]}\n    {answer.sentence[:400]}")

    case_after_case()
    _say(f"{kind}: exit codes {dict(codes)}")
    return len(found)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def _lived_in(scratch: Path) -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    (scratch / "offline").mkdir()
    os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "SLIMLINE_RETRIES": "0"}
    with (
        prefect_test_harness(server_startup_timeout=120),
        Home.create(scratch / "home", scratch / "offline").lived_in(),
    ):
        assert call("plan", "smoke", variables={}).code == 0, "the offline default cannot be built"
        yield


if __name__ == "__main__":
    code = main()
    remove_scratch()
    sys.stdout.flush()
    os._exit(code)  # libraries' threads of so many runs need not be waited for
