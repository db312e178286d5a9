"""Better, worse or noise: against a hand computation, and on figures that have no error, or no sense."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation.significance.verdicts import Figure, holm, judge, p_value

INFINITY, NAN = float("inf"), float("nan")


def ppl(value: float, stderr: float | None = None) -> Figure:
    return Figure(value, stderr, higher_is_better=False)


def acc(value: float, stderr: float | None = None) -> Figure:
    return Figure(value, stderr, higher_is_better=True)


def test_p_value_is_that_of_the_normal_distribution() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    z = (12.0 - 10.0) / math.hypot(0.6, 0.8)
    expected = 2 * (1 - normal.cdf(torch.tensor(z, dtype=torch.float64)))
    assert p_value(ppl(12.0, 0.6), ppl(10.0, 0.8)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "now, before", [(ppl(1.0), ppl(2.0, 0.1)), (ppl(INFINITY, 0.1), ppl(2.0, 0.1)), (ppl(1.0, 0.0), ppl(2.0, 0.0))]
)
def test_no_p_value_without_noise_to_compare_with(now: Figure, before: Figure) -> None:
    assert p_value(now, before) is None


def test_holm_by_hand() -> None:
    # thresholds 0.05/4, 0.05/3, 0.05/2: the third is above its own, so it and all after it stay
    assert holm([0.04, 0.01, None, 0.015, 0.03], 0.05) == (False, True, False, True, False)
    assert holm([], 0.05) == ()


def test_holm_keeps_the_family_wise_level() -> None:
    """No difference anywhere, twenty figures, two thousand nights: at most 5 % of the nights tell of one."""
    noise = torch.randn(2000, 20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nights = sum(
        any(j.verdict != "noise" for j in judge([(ppl(float(a), 1.0), ppl(float(b), 1.0)) for a, b in night]))
        for night in noise
    )
    assert 0.03 < nights / 2000 < 0.065


def test_direction() -> None:
    pairs = [(ppl(9.0, 0.1), ppl(10.0, 0.1)), (acc(0.5, 0.01), acc(0.6, 0.01)), (acc(0.6, 0.01), acc(0.5, 0.01))]
    assert [judgement.verdict for judgement in judge(pairs)] == ["better", "worse", "better"]


def test_the_same_the_first_and_noise() -> None:
    verdicts = [
        j.verdict for j in judge([(ppl(9.0, 0.1), ppl(9.0, 0.1)), (ppl(9.0), None), (ppl(9.1, 0.1), ppl(9.0, 0.1))])
    ]
    assert verdicts == ["same", "first", "noise"]


def test_without_errors_the_relative_change_decides() -> None:
    pairs = [(ppl(109.0), ppl(100.0)), (ppl(111.0), ppl(100.0)), (ppl(80.0), ppl(100.0)), (ppl(0.1), ppl(0.0))]
    assert [judgement.verdict for judgement in judge(pairs, tolerance=0.1)] == ["noise", "worse", "better", "worse"]


def test_a_broken_model_is_worse_and_a_mended_one_better() -> None:
    pairs = [
        (ppl(INFINITY, None), ppl(10.0, 0.1)),
        (ppl(NAN), ppl(10.0)),
        (ppl(10.0), ppl(NAN)),
        (acc(NAN), acc(0.5)),
        (ppl(NAN), ppl(NAN)),
    ]
    assert [judgement.verdict for judgement in judge(pairs)] == ["worse", "worse", "better", "worse", "same"]
