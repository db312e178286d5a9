"""Tests and intervals for paired scores against brute force, scipy and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from evaluation.significance import resampling
from evaluation.significance.resampling import mcnemar_p, resampled_means, sign_flip_p


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("lost, gained", [(0, 1), (1, 0), (3, 3), (10, 2), (2, 10), (17, 40), (300, 212), (9000, 9300)])
def test_mcnemar_is_the_binomial_test_of_the_flips(lost: int, gained: int) -> None:
    assert mcnemar_p(lost, gained) == pytest.approx(binomtest(lost, lost + gained).pvalue, rel=1e-9)


def test_mcnemar_without_flips_and_with_very_many_on_one_side() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 5) == 1.0
    assert mcnemar_p(0, 300) == 2 * 0.5**300
    assert mcnemar_p(20_000, 0) == 0.0


@pytest.mark.parametrize("items", [1, 2, 5, 11])
def test_few_items_are_flipped_in_all_ways(items: int) -> None:
    differences = generator(items).normal(0.3, 1, items)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=items)]
    expected = np.mean([total >= abs(differences.sum()) - 1e-12 for total in sums])
    assert sign_flip_p(differences, generator()) == expected
    assert sign_flip_p(np.append(differences, [0.0, 0.0]), generator()) == expected


def test_drawn_flips_agree_with_all_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = generator(3).normal(0.4, 1, 13)
    exact = sign_flip_p(differences, generator())
    monkeypatch.setattr(resampling, "_MOST_ENUMERATED", 0)
    drawn = sign_flip_p(differences, generator(), resamples=100_000)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 100_000))


def test_flips_of_right_and_wrong_are_mcnemars() -> None:
    """Sums of ones tie often: they must be counted as equal."""
    differences = np.array([1.0] * 20 + [-1.0] * 11 + [0.0] * 50) * 0.1
    exact = mcnemar_p(20, 11)
    assert sign_flip_p(differences, generator(), resamples=100_000) == pytest.approx(exact, abs=0.006)


def test_the_order_of_items_does_not_matter() -> None:
    values = generator(1).normal(0.1, 1, 200)
    shuffled = generator(2).permutation(values)
    assert sign_flip_p(values, generator()) == sign_flip_p(shuffled, generator())
    assert sign_flip_p(values, generator()) == sign_flip_p(-values, generator())


def test_a_great_difference_has_a_smaller_p_than_flips_can_show() -> None:
    p = sign_flip_p(np.ones(100), generator())
    assert 2 * 0.5**100 < p <= 2 * math.exp(-50) * 1.000001
    assert sign_flip_p(np.ones(15), generator(), resamples=1000) >= 2 * 0.5**15


def test_under_the_null_p_values_are_no_smaller_than_they_should_be() -> None:
    draw = generator(5)
    found = [sign_flip_p(draw.standard_t(3, 30), draw, resamples=400) for _ in range(600)]
    for level in (0.01, 0.05, 0.2):
        share = np.mean(np.array(found) <= level)
        assert share < level + 3 * math.sqrt(level * (1 - level) / len(found))
    assert np.mean(np.array(found) <= 0.2) > 0.14


@pytest.mark.parametrize("distinct", [True, False])
def test_resampled_means_are_those_of_drawn_items(distinct: bool) -> None:
    """Mean and variance over the resamples against theory; grouped and drawn one by one are the same distribution."""
    draw = generator(7)
    scores = draw.integers(0, 2, (400, 2)).astype(float) if distinct else draw.normal(0, 1, (400, 2))
    means = resampled_means(scores, np.ones(400), draw, resamples=20_000)
    assert means.shape == (20_000, 2)
    assert means.mean(0) == pytest.approx(scores.mean(0), abs=4e-3)
    assert np.cov(means.T) == pytest.approx(np.cov(scores.T, ddof=0) / 400, rel=0.05, abs=3e-5)


def test_weights_are_resampled_with_their_items() -> None:
    draw = generator(8)
    weights = draw.integers(1, 5, 300).astype(float)
    scores = draw.normal(0, 1, (300, 1)) + weights[:, None]
    means = resampled_means(scores, weights, generator(), resamples=20_000)[:, 0]
    brute = generator(9)
    drawn = (brute.integers(300, size=300) for _ in range(4000))
    expected = np.array([np.average(scores[index, 0], weights=weights[index]) for index in drawn])
    assert means.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert means.std() == pytest.approx(expected.std(), rel=0.05)


def test_resampling_in_chunks_changes_no_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = generator(4).normal(0, 1, (50, 2))
    monkeypatch.setattr(resampling, "_NUMBERS_AT_ONCE", 170)
    assert resampled_means(scores, np.ones(50), generator(), resamples=11).shape == (11, 2)
    assert 0 < sign_flip_p(scores[:, 0], generator(), resamples=11) <= 1


@pytest.mark.parametrize("kind", ["normal", "flips"])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind: str) -> None:
    draw, hits, rounds = generator(11), 0, 300
    for _ in range(rounds):
        if kind == "normal":
            hard = draw.normal(0, 3, 120)
            scores = np.column_stack([hard + 0.5 + draw.normal(0, 1, 120), hard + draw.normal(0, 1, 120)])
            truth = 0.5
        else:
            both = draw.random(400)
            scores = np.column_stack([both < 0.6, (both < 0.5) | (both > 0.97)]).astype(float)
            truth = 0.6 - 0.53
        means = resampled_means(scores, np.ones(len(scores)), draw, resamples=600)
        low, high = np.quantile(means[:, 0] - means[:, 1], (0.025, 0.975))
        hits += low <= truth <= high
    assert 0.91 <= hits / rounds <= 0.985
