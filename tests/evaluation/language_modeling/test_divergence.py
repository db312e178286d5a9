"""Divergence from a dense model against the definition, and the suite that reports it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import evaluation.language_modeling.divergence as module
from evaluation.errors import EvaluationError
from evaluation.inference.options import EvalOptions
from evaluation.inference.replicas import ReplicaProcesses
from evaluation.language_modeling.divergence import (
    Agreement,
    agreements,
    divergence,
    divergence_quantile,
    perplexity_ratio,
    top1_agreement,
)
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.protocol import WindowProtocol
from evaluation.language_modeling.windows import Window, windows_of
from evaluation.significance.paired import pair
from evaluation.significance.verdicts import Figure
from evaluation.suite import SuiteResult, TextNeed
from evaluation.suites import agreement as suite
from tests.tiny import add_noise_, tiny_model

TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog, {i * i} times." for i in range(12)]
PROTOCOL = WindowProtocol(window=24, keep_last_partial=True)


class Texts:
    """Data with one text field."""

    def texts(self, need: TextNeed) -> list[str]:
        return TEXTS

    def folder(self, repo_id: str) -> None:
        return None


@pytest.fixture
def other() -> PreTrainedModel:
    return tiny_model("llama", seed=1)


@pytest.fixture
def near(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a little noise."""
    damaged = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in damaged.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return damaged


@pytest.fixture
def windows(tokenizer: PreTrainedTokenizerFast) -> list[Window]:
    return windows_of(tokenizer, TEXTS, PROTOCOL)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dense: PreTrainedModel, **config: object
) -> SuiteResult:
    asked = suite.Config.model_validate({"windows": [24], "bos": "none"} | config)
    return suite.evaluate(model, tokenizer, Texts(), asked, EvalOptions(), reference=dense)


def test_divergence_is_that_of_the_definition(
    model: PreTrainedModel, other: PreTrainedModel, windows: list[Window]
) -> None:
    """In float64, window by window, with torch's own kl_div."""
    found = agreements(other, model, windows, EvalOptions())
    for window, got in zip(windows, found, strict=True):
        ids = torch.from_numpy(window.inputs.copy())[None]
        with torch.no_grad():
            q, p = (each(input_ids=ids).logits[0].double().log_softmax(-1) for each in (other, model))
        places = range(window.first, window.first + len(window.targets))
        kl = [float(torch.nn.functional.kl_div(q[at], p[at], log_target=True, reduction="sum")) for at in places]
        lost = [float(p[at, token] - q[at, token]) for at, token in zip(places, window.targets, strict=True)]
        assert got.kl_K.tolist() == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert got.lost_K.tolist() == pytest.approx(lost, abs=1e-5)
        assert got.same_K.tolist() == [bool(q[at].argmax() == p[at].argmax()) for at in places]


def test_a_model_diverges_not_from_itself(model: PreTrainedModel, windows: list[Window]) -> None:
    found = agreements(model, model, windows, EvalOptions())
    assert divergence(found) == Figure(0.0, 0.0)
    assert divergence_quantile(found, 0.99).value == 0.0
    assert top1_agreement(found).value == perplexity_ratio(found).value == 1.0


def test_the_direction_is_from_the_reference(
    model: PreTrainedModel, other: PreTrainedModel, windows: list[Window]
) -> None:
    there = divergence(agreements(model, other, windows, EvalOptions())).value
    back = divergence(agreements(other, model, windows, EvalOptions())).value
    assert there != pytest.approx(back, rel=1e-3)


def test_more_damage_diverges_more(
    model: PreTrainedModel, near: PreTrainedModel, other: PreTrainedModel, windows: list[Window]
) -> None:
    little, much = (agreements(each, model, windows, EvalOptions()) for each in (near, other))
    assert 0 < divergence(little).value < 0.2 * divergence(much).value
    assert top1_agreement(little).value > top1_agreement(much).value


def test_batches_and_slices_change_nothing(
    model: PreTrainedModel, near: PreTrainedModel, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agreements(near, model, windows, EvalOptions(batch_size=1))
    many = agreements(near, model, windows, EvalOptions(batch_size=5))
    monkeypatch.setattr(module, "_FLOAT32_BYTES", 4 * 320 * 5)
    sliced = agreements(near, model, windows, EvalOptions(batch_size=5))
    for left, middle, right in zip(one, many, sliced, strict=True):
        assert left.window is right.window
        np.testing.assert_allclose(middle.kl_K, left.kl_K, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(middle.kl_K, right.kl_K)


def test_standard_errors_take_windows_as_the_unit() -> None:
    window = Window(0, np.arange(3), np.arange(2), 0)
    parts = [np.array([0.1, 0.3], np.float32), np.array([0.2, 0.8], np.float32), np.array([0.5, 0.5], np.float32)]
    found = [Agreement(window, part, part > 0.4, part) for part in parts]
    kl, top1, ratio = divergence(found), top1_agreement(found), perplexity_ratio(found)
    means = [0.2, 0.5, 0.5]
    assert kl.value == pytest.approx(0.4)
    assert kl.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert top1.value == pytest.approx(0.5)
    assert (ratio.value, ratio.stderr) == (pytest.approx(math.exp(0.4)), pytest.approx(math.exp(0.4) * kl.stderr))
    assert divergence(found[:1]).stderr is None


def test_vocabularies_that_differ_are_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    small = tiny_model("llama", vocab_size=300)
    with pytest.raises(EvaluationError, match="a vocabulary of 300 tokens and its reference one of 320"):
        evaluate(small, tokenizer, model)


def test_nan_is_refused(model: PreTrainedModel, near: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.nn.init.constant_(near.lm_head.weight, math.nan)
    with pytest.raises(EvaluationError, match="gives NaN"):
        evaluate(near, tokenizer, model)


def test_a_tie_for_the_greatest_logit_is_no_disagreement() -> None:
    """In half precision several tokens often share the greatest logit, and which is named first says nothing."""
    mine = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [2.0, 2.0, 1.0]])
    theirs = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    _, same, _ = module._per_token(mine, theirs, torch.zeros(3, dtype=torch.long))
    assert same.tolist() == [True, False, False]


def test_bfloat16_is_compared_in_float32(model: PreTrainedModel, windows: list[Window]) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    kl = divergence(agreements(half, model, windows, EvalOptions())).value
    assert 0 < kl < 0.05


def test_memory_that_runs_out_halves_the_batch(
    model: PreTrainedModel, near: PreTrainedModel, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = agreements(near, model, windows, EvalOptions(batch_size=2))
    real = module._compare

    def tight(reference: PreTrainedModel, model: PreTrainedModel, rows: list[Window]) -> list[Agreement]:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(reference, model, rows)

    monkeypatch.setattr(module, "_compare", tight)
    found = agreements(near, model, windows, EvalOptions(batch_size=8))
    assert divergence(found).value == pytest.approx(divergence(expected).value, rel=1e-5)


def test_replicas_are_not_used(model: PreTrainedModel, near: PreTrainedModel, windows: list[Window]) -> None:
    replicas = object.__new__(ReplicaProcesses)
    assert len(agreements(near, model, windows, EvalOptions(replicas=replicas))) == len(windows)


def test_models_come_back_as_they_were(model: PreTrainedModel, near: PreTrainedModel, windows: list[Window]) -> None:
    near.train()
    agreements(near, model, windows[:1], EvalOptions())
    assert near.training
    assert not model.training


def test_the_suite_reports_figures_and_samples(
    model: PreTrainedModel, near: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate(near, tokenizer, model, windows=[24, 48])
    figures = {metric.metric: metric for metric in result.report.metrics}
    assert list(figures) == [
        f"{name}@{w}" for w in (24, 48) for name in ("kl", "kl_p99", "top1_agreement", "ppl_ratio")
    ]
    assert {metric.task for metric in figures.values()} == {"wikitext-2-raw-v1"}
    assert figures["top1_agreement@24"].higher_is_better
    assert not figures["kl@24"].higher_is_better
    assert result.report.protocol["dtype"] == "torch.float32"
    assert result.report.protocol["bos"] == "none"
    mine = [sample for sample in result.samples if "kl@24" in sample.scores]
    weights = [sample.weight for sample in mine]
    assert np.average([s.scores["kl@24"] for s in mine], weights=weights) == pytest.approx(figures["kl@24"].value)
    lost = np.average([s.scores["ppl_ratio@24"] for s in mine], weights=weights)
    assert math.exp(lost) == pytest.approx(figures["ppl_ratio@24"].value)
    assert len(result.samples) == sum(figures[f"kl@{w}"].num_examples or 0 for w in (24, 48))


def test_the_ratio_is_that_of_two_perplexities(
    model: PreTrainedModel, near: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate(near, tokenizer, model)
    (ratio,) = [metric.value for metric in result.report.metrics if metric.metric == "ppl_ratio@24"]
    protocol = WindowProtocol(window=24, bos="none")
    mine, dense = (perplexity(each, tokenizer, TEXTS, protocol) for each in (near, model))
    assert ratio == pytest.approx(mine.ppl / dense.ppl, rel=1e-6)


def test_two_damaged_models_are_paired_by_their_divergence(
    model: PreTrainedModel, near: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    worse = copy.deepcopy(model)
    add_noise_(worse, 5)
    sides = [evaluate(each, tokenizer, model, keep_last_partial=True).samples for each in (near, worse)]
    found, problems = pair(*sides)
    assert problems == ()
    by_metric = {each.metric: each for each in found}
    assert by_metric["kl@24"].difference < 0
    assert by_metric["kl@24"].p_value < 0.001
    assert by_metric["ppl_ratio@24"].value > 1


def test_windows_too_long_and_figures_per_word_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(EvaluationError, match="a window of 600 tokens is longer"):
        evaluate(model, tokenizer, model, windows=[600])
    with pytest.raises(EvaluationError, match="normalise is word"):
        suite.check(suite.Config(normalise=("word",)))
    with pytest.raises(EvaluationError, match="names a length twice"):
        suite.check(suite.Config(windows=(24, 24)))


def test_progress_ends_at_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    reported: list[float] = []
    options = replace(EvalOptions(), progress=lambda share, message: reported.append(share))
    config = suite.Config(windows=(24, 48), bos="none")
    suite.evaluate(model, tokenizer, Texts(), config, options, reference=model)
    assert reported == sorted(reported)
    assert reported[-1] == 1.0
