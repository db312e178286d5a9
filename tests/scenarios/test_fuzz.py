"""A few of each kind of odd values and broken files, always the same: python -m tests.fuzz throws as many as wanted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.run.outcome import RunResult
from tests.command_line import call
from tests.flows.home import Home
from tests.fuzz.judging import fault
from tests.fuzz.throwing import KINDS

pytestmark = pytest.mark.slow  # not in `make test-fast`

HEALTHY = list(HealthCheck)
FEW = settings(derandomize=True, database=None, deadline=None, max_examples=20, suppress_health_check=HEALTHY)


@pytest.fixture(scope="module")
def scratch(smoke: tuple[Home, RunResult], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for broken files, while this process lives in a home in which the smoke spec was run."""
    folder = tmp_path_factory.mktemp("fuzz")
    home = smoke[0].copy(folder / "home")
    home.variables.update(HF_ENDPOINT="http://127.0.0.1:9", SLIMLINE_RETRIES="0")
    with home.lived_in():
        yield folder


@pytest.mark.parametrize("kind", ["values", "variables", "specs", "models", "data"])
def test_planning_answers_in_one_sentence(kind: str, scratch: Path, offline_root: Path) -> None:
    @FEW
    @given(st.data())
    def thrown(data: Any) -> None:
        answer_of(kind, data, scratch, offline_root)

    thrown()


@pytest.mark.parametrize("kind", ["runs", "numbers"])
def test_a_run_answers_in_one_sentence(kind: str, scratch: Path, offline_root: Path) -> None:
    @settings(FEW, max_examples=3)
    @given(st.data())
    def thrown(data: Any) -> None:
        answer_of(kind, data, scratch, offline_root)

    thrown()


def answer_of(kind: str, data: Any, scratch: Path, offline_root: Path) -> None:
    case = KINDS[kind](data.draw, scratch, offline_root / "slimline/tiny-random-llama")
    answer = call(*case.arguments, variables=case.variables)
    assert fault(answer) is None, f"{case.said}: {fault(answer)}"
