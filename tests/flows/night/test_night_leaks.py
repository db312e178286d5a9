"""A night that would train on what it measures is refused before any work; one that says it is meant is not."""

from __future__ import annotations

import pytest

from flows.errors import SpecError
from flows.night import nightly
from flows.spec.load import load_night
from tests.flows.home import Home

pytestmark = pytest.mark.slow

ARTICLES = "{dataset: slimline/wikipedia, split: test, instruction: title, input: null, output: text}"

#: one cell that trains on the test articles of the perplexity, after one that trains on nothing
LEAKY = [
    "matrix.methods={slimgpt: {split: ffn}}",
    "matrix.sparsities=[0.2]",
    f"matrix.recoveries.lora.data={ARTICLES}",
]
SENTENCE = (
    r"lora trains on slimline/wikipedia \(test\), and perplexity measures rows of it: slimline/wikipedia \(test\); "
    r"train on other data, measure another split, or say in the spec that it is meant: "
    r"meant_overlaps: \[slimline/wikipedia\]"
)


def test_a_night_that_leaks_is_refused_before_any_cell_runs(home: Home, filled: list[str]) -> None:
    with pytest.raises(SpecError, match=SENTENCE):
        home.night("smoke", LEAKY)
    assert filled == []
    assert home.results.runs() == ()
    assert home.results.nights() == ()


def test_a_night_without_a_leak_or_with_one_that_is_meant_passes(home: Home) -> None:
    with home.lived_in():
        nightly._refuse_leaks(load_night("smoke"))
        nightly._refuse_leaks(load_night("smoke", [*LEAKY, "meant_overlaps=[slimline/wikipedia]"]))
        with pytest.raises(SpecError, match=SENTENCE):
            nightly._refuse_leaks(load_night("smoke", LEAKY))


def test_a_cell_that_cannot_be_planned_is_its_own_matter(home: Home) -> None:
    with home.lived_in():
        nightly._refuse_leaks(load_night("smoke", ["matrix.models.tiny.id=owner/nothing"]))


def test_a_plan_warns(home: Home) -> None:
    said = home.slimline("plan", "smoke", "--set", f"steps.1.data={ARTICLES}").stderr
    assert "lora trains on slimline/wikipedia (test), and perplexity measures rows of it" in said
    assert "trains on" not in home.slimline("plan", "smoke").stderr
