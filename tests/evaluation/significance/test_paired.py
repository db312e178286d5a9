"""Two models on the same items: what is paired, what is refused, and the figures beside brute force."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from evaluation.report import Average
from evaluation.samples import Sample
from evaluation.significance.paired import Paired, Unpaired, is_exponential, pair


def answers(scores: list[float], task: str = "piqa", metric: str = "acc") -> list[Sample]:
    return [Sample(task, item, f"{task}{item}", {metric: float(score)}) for item, score in enumerate(scores)]


def windows(nlls: np.ndarray, weights: np.ndarray, metric: str = "ppl@128") -> list[Sample]:
    return [
        Sample("wikitext", item, f"w{item}", {metric: float(nll)}, weight=float(weight))
        for item, (nll, weight) in enumerate(zip(nlls, weights, strict=True))
    ]


def one(samples: list[Sample], reference: list[Sample]) -> Paired:
    (paired,), unpaired = pair(samples, reference)
    assert unpaired == ()
    return paired


def bits(count: int, share: float, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(count) < share).astype(float).tolist()


def test_right_and_wrong_answers_are_tested_by_mcnemar() -> None:
    mine, theirs = bits(300, 0.6, 1), bits(300, 0.7, 2)
    found = one(answers(mine), answers(theirs))
    lost = sum(a < b for a, b in zip(mine, theirs, strict=True))
    gained = sum(a > b for a, b in zip(mine, theirs, strict=True))
    assert (found.test, found.num_items, found.num_lost, found.num_gained) == ("mcnemar", 300, lost, gained)
    assert found.value == pytest.approx(np.mean(mine))
    assert found.difference == pytest.approx(np.mean(mine) - np.mean(theirs))
    assert found.p_value == pytest.approx(binomtest(lost, lost + gained).pvalue)
    # the interval of a mean of -1, 0 and 1, by the normal approximation
    error = np.std(np.array(mine) - np.array(theirs)) / math.sqrt(300)
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.01)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.01)


def test_a_model_beside_itself_has_no_difference() -> None:
    draw = np.random.default_rng(0)
    for samples in (
        answers(bits(100, 0.5, 0)),
        answers(draw.normal(0, 1, 100).tolist(), metric="f1"),
        windows(draw.normal(3, 1, 100), np.full(100, 127.0)),
    ):
        found = one(samples, samples)
        assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_perplexity_is_exp_of_the_mean_over_tokens() -> None:
    draw = np.random.default_rng(4)
    weights = draw.integers(20, 128, 80).astype(float)
    theirs = draw.normal(3, 0.5, 80)
    mine = theirs + draw.normal(0.1, 0.05, 80)
    found = one(windows(mine, weights), windows(theirs, weights))
    ppl = math.exp(np.average(mine, weights=weights)), math.exp(np.average(theirs, weights=weights))
    assert (found.value, found.reference_value) == pytest.approx(ppl)
    assert found.difference == pytest.approx(ppl[0] - ppl[1])
    assert (found.test, found.num_lost, found.num_gained) == ("sign_flip", None, None)
    assert found.p_value < 1e-4
    assert 0 < found.low < found.difference < found.high
    # delta method on the ratio: relative error of the difference between two correlated perplexities
    assert found.high - found.low < 0.5 * (ppl[0] * 3.92 * np.std(mine) / math.sqrt(80))


def test_pairs_show_what_separate_errors_hide() -> None:
    draw = np.random.default_rng(5)
    hard = draw.normal(3, 1, 100)
    found = one(windows(hard + 0.02 + draw.normal(0, 0.02, 100), np.ones(100)), windows(hard, np.ones(100)))
    assert found.p_value < 1e-4
    error = found.value * np.std(hard) / 10
    assert abs(found.difference) < 0.25 * error


@pytest.mark.parametrize("metric", ["ppl@128", "f1"])
def test_no_difference_is_seldom_called_one(metric: str) -> None:
    draw = np.random.default_rng(6)
    p_values, inside = [], 0
    for _ in range(150):
        hard = draw.normal(3, 1, 60)
        mine, theirs = (windows(hard + draw.normal(0, 0.3, 60), np.ones(60), metric) for _ in range(2))
        (found,), _ = pair(mine, theirs, resamples=400)
        p_values.append(found.p_value)
        inside += found.low <= 0 <= found.high
    assert np.mean(np.array(p_values) <= 0.05) <= 0.11
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.14)
    assert inside / 150 >= 0.88


def test_the_order_of_samples_changes_nothing() -> None:
    draw = np.random.default_rng(7)
    mine = [*answers(bits(90, 0.5, 3)), *windows(draw.normal(3, 1, 50), np.arange(50) + 2.0)]
    theirs = [*answers(bits(90, 0.6, 4)), *windows(draw.normal(3, 1, 50), np.arange(50) + 2.0)]
    expected, _ = pair(mine, theirs)
    for samples in (mine, theirs):
        random.Random(1).shuffle(samples)
    found, _ = pair(mine, theirs)
    assert sorted(found, key=lambda each: each.task) == sorted(expected, key=lambda each: each.task)


def test_a_figure_does_not_depend_on_what_else_is_compared() -> None:
    mine, theirs = answers(bits(90, 0.5, 3)), answers(bits(90, 0.6, 4))
    more = answers(bits(90, 0.5, 5), task="boolq")
    assert one(mine, theirs) in pair([*more, *mine], [*more, *theirs])[0]


def test_swapping_the_models_turns_the_sign() -> None:
    draw = np.random.default_rng(8)
    mine, theirs = windows(draw.normal(3, 1, 60), np.ones(60)), windows(draw.normal(3.2, 1, 60), np.ones(60))
    there, back = one(mine, theirs), one(theirs, mine)
    assert (there.difference, there.p_value) == (pytest.approx(-back.difference), back.p_value)
    assert (there.low, there.high) == (pytest.approx(-back.high, abs=1), pytest.approx(-back.low, abs=1))


def test_items_that_were_asked_otherwise_are_counted_and_refused() -> None:
    mine, theirs = answers(bits(40, 0.5, 1)), answers(bits(40, 0.5, 2))
    for item in (3, 4, 5):
        theirs[item] = replace(theirs[item], item_hash="other")
    boolq = answers(bits(40, 0.5, 3), task="boolq")
    found, (problem,) = pair([*mine, *boolq], [*theirs, *boolq])
    assert [each.task for each in found] == ["boolq"]
    assert (problem.task, problem.metric) == ("piqa", "acc")
    assert (
        problem.reason == "the items differ: 40 beside 40, of which 0 are on one side only and 3 were asked otherwise"
    )


def test_items_on_one_side_only_are_counted_and_refused() -> None:
    found, (problem,) = pair(answers(bits(40, 0.5, 1)), answers(bits(50, 0.5, 2)))
    assert found == ()
    assert "40 beside 50, of which 10 are on one side only and 0 were asked otherwise" in problem.reason


def test_windows_of_other_lengths_in_tokens_are_not_the_same_item() -> None:
    nlls = np.ones(10)
    _, (problem,) = pair(windows(nlls, np.full(10, 127.0)), windows(nlls, np.full(10, 126.0)))
    assert "10 were asked otherwise" in problem.reason


def test_numbers_that_are_given_twice_are_refused() -> None:
    twice = [*answers([1.0, 0.0]), *answers([1.0])]
    assert pair(twice, twice)[1] == (Unpaired("piqa", "acc", "1 of 3 items have the number of another"),)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    broken = answers([1.0, 0.0, value])
    _, (problem,) = pair(broken, answers([1.0, 0.0, 1.0]))
    assert problem.reason == "1 of 3 items have no finite score"


def test_a_perplexity_beyond_all_numbers_is_refused() -> None:
    weights = np.ones(4)
    found, (problem,) = pair(windows(np.full(4, 800.0), weights), windows(np.full(4, 3.0), weights))
    assert found == ()
    assert problem.reason.startswith("inf beside 20.0855")


def test_two_windows_lengths_of_one_text_share_their_numbers() -> None:
    draw = np.random.default_rng(1)
    short, long = windows(draw.normal(3, 1, 30), np.ones(30)), windows(draw.normal(3, 1, 4), np.ones(4), "ppl@2048")
    found, problems = pair([*short, *long], [*short, *long])
    assert [(each.metric, each.num_items) for each in found] == [("ppl@128", 30), ("ppl@2048", 4)]
    assert problems == ()


def test_metrics_that_only_one_has_are_left_out() -> None:
    assert pair(answers([1.0, 0.0]), answers([1.0, 0.0], metric="acc_norm")) == ((), ())
    assert pair((), answers([1.0])) == ((), ())


def average(weighted_by: str) -> Average:
    return Average(
        task="average", metric="acc", parts=(("piqa", "acc"), ("boolq", "acc")), weighted_by=weighted_by  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("weighted_by", ["tasks", "items"])
def test_an_average_over_tasks_is_paired_item_by_item(weighted_by: str) -> None:
    mine = {"piqa": bits(400, 0.5, 1), "boolq": bits(100, 0.8, 2)}
    theirs = {"piqa": bits(400, 0.6, 3), "boolq": bits(100, 0.6, 4)}
    sides = [[s for task, scores in side.items() for s in answers(scores, task)] for side in (mine, theirs)]
    (*_, found), problems = pair(*sides, averages=[average(weighted_by)])
    shares = {"tasks": (0.5, 0.5), "items": (0.8, 0.2)}[weighted_by]
    gaps = [np.array(mine[task]) - np.array(theirs[task]) for task in mine]
    difference = sum(share * gap.mean() for share, gap in zip(shares, gaps, strict=True))
    error = math.sqrt(sum(share**2 * gap.var() / len(gap) for share, gap in zip(shares, gaps, strict=True)))
    assert problems == ()
    assert (found.task, found.num_items, found.test) == ("average", 500, "sign_flip")
    assert found.difference == pytest.approx(difference)
    assert found.low == pytest.approx(difference - 1.96 * error, abs=0.12 * error)
    assert found.high == pytest.approx(difference + 1.96 * error, abs=0.12 * error)
    # under the null hypothesis no task has a difference either, so squares are taken about zero
    error = math.sqrt(sum(share**2 * (gap**2).mean() / len(gap) for share, gap in zip(shares, gaps, strict=True)))
    assert found.p_value == pytest.approx(
        math.erfc(abs(difference / error) / math.sqrt(2)), abs=0.06
    )  # flips are discrete
    assert found.num_lost == sum(int((gap < 0).sum()) for gap in gaps)


def test_an_average_of_averages_is_paired_too() -> None:
    """Two categories count the same, whatever their tasks and items."""
    shares = {"a": 0.5, "b": 0.5, "c": 1.0}
    sizes = {"a": 50, "b": 150, "c": 80}
    mine = {task: bits(size, 0.5, seed) for seed, (task, size) in enumerate(sizes.items())}
    theirs = {task: bits(size, 0.7, seed + 9) for seed, (task, size) in enumerate(sizes.items())}
    averages = [
        Average(task="first", metric="acc", parts=(("a", "acc"), ("b", "acc")), weighted_by="tasks"),
        Average(task="second", metric="acc", parts=(("c", "acc"),), weighted_by="tasks"),
        Average(task="all", metric="acc", parts=(("first", "acc"), ("second", "acc")), weighted_by="tasks"),
    ]
    sides = [[s for task, scores in side.items() for s in answers(scores, task)] for side in (mine, theirs)]
    found = {each.task: each for each in pair(*sides, averages=averages)[0]}
    value = sum(share * np.mean(mine[task]) for task, share in shares.items()) / 2
    assert found["all"].value == pytest.approx(value)
    assert found["all"].num_items == 280
    assert found["second"].difference == pytest.approx(found["c"].difference)


def test_an_average_of_which_a_part_cannot_be_paired_is_refused_with_the_part() -> None:
    mine = [*answers([1.0, 0.0]), *answers([1.0, 0.0], "boolq")]
    theirs = [*answers([1.0, 0.0]), *answers([1.0], "boolq")]
    above = Average(task="all", metric="acc", parts=(("average", "acc"),), weighted_by="tasks")
    found, problems = pair(mine, theirs, averages=[average("tasks"), above])
    assert [each.task for each in found] == ["piqa"]
    assert [each.task for each in problems] == ["boolq", "average", "all"]
    assert problems[1:] == (
        Unpaired("average", "acc", "its part boolq/acc could not be compared"),
        Unpaired("all", "acc", "its part average/acc could not be compared"),
    )


@pytest.mark.parametrize(
    "count, reason",
    [
        (2, "its parts a0/acc, a1/acc could not be compared"),
        (57, "its parts a0/acc, a1/acc, a2/acc and 54 more could not be compared"),
    ],
)
def test_of_many_parts_that_cannot_be_paired_some_are_named(count: int, reason: str) -> None:
    parts = tuple((f"a{number}", "acc") for number in range(count))
    _, (problem,) = pair((), (), averages=[Average(task="mean", metric="acc", parts=parts, weighted_by="items")])
    assert problem == Unpaired("mean", "acc", reason)


def test_tens_of_thousands_of_items_take_seconds() -> None:
    tasks = [answers(bits(10_000, 0.5, seed), f"task{seed}") for seed in range(3)]
    draw = np.random.default_rng(0)
    tasks.append(windows(draw.normal(3, 1, 2600), np.full(2600, 127.0)))
    samples = [sample for task in tasks for sample in task]
    other = [replace(s, scores={name: 1 - value for name, value in s.scores.items()}) for s in samples]
    started = time.process_time()
    assert len(pair(samples, other)[0]) == 4
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "metric, answer",
    [("ppl@128", True), ("word_ppl@2048", True), ("word_perplexity", True), ("acc", False), ("bits_per_byte", False)],
)
def test_perplexities_are_known_by_their_names(metric: str, answer: bool) -> None:
    assert is_exponential(metric) is answer
