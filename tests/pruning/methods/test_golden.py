"""Numbers of a method may change, but not silently: cached artifacts would go on under the same key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infra import registry
from tests.pruning.golden.pins import cases_of, outcome, path

METHODS = registry.available("pruning.methods")
CASES = [(method, case) for method in METHODS for case in cases_of(method)]
WRITE = "python -m tests.pruning.golden {method}"


def pinned(method: str) -> dict[str, Any]:
    if not path(method).is_file():
        pytest.fail(f"no pinned numbers for method {method!r}: run  {WRITE.format(method=method)}")
    return json.loads(path(method).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", METHODS)
def test_pins_are_of_this_version(method: str) -> None:
    version = registry.load("pruning.methods", method, "method").VERSION
    assert pinned(method)["version"] == version, f"VERSION is {version} now: run  {WRITE.format(method=method)}"


@pytest.mark.parametrize(("method", "case"), CASES)
def test_numbers_change_only_with_the_version(method: str, case: str) -> None:
    expected, actual = pinned(method)["cases"][case], outcome(method, *cases_of(method)[case])
    message = f"{method} gives other numbers: bump its VERSION, then run  {WRITE.format(method=method)}"
    assert actual["kept"] == expected["kept"], message
    assert actual["numbers"] == pytest.approx(expected["numbers"], rel=1e-3, abs=1e-4), message


@pytest.mark.parametrize("method", METHODS)
def test_no_pin_is_left_over(method: str) -> None:
    assert set(pinned(method)["cases"]) == set(cases_of(method))
