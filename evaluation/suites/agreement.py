"""KL divergence and top-1 agreement with the dense model on a text data set; WikiText-2 raw test by default."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from evaluation.bounds import Count
from evaluation.errors import EvaluationError
from evaluation.inference.options import EvalOptions, part_of
from evaluation.inference.prompts import adds_bos
from evaluation.language_modeling.protocol import window_lengths
from evaluation.report import EvalReport, Metric
from evaluation.suite import SuiteData, SuiteResult
from evaluation.suites import perplexity
from evaluation.suites.perplexity import check_model, metrics_of, needs, sample_of, task_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.samples import Sample

__all__ = ["COMPARES", "IMPORTS", "VERSION", "Config", "check", "check_model", "evaluate", "needs", "task_name"]

VERSION = 2
IMPORTS = ("evaluation.language_modeling.divergence",)

COMPARES = True
"""`evaluate` takes the dense model as `reference`: both are in memory at once."""


class Config(perplexity.Config):
    """The data and the windows, as of the suite perplexity; nothing is counted per word or byte."""

    windows: tuple[Annotated[Count, Field(ge=2)] | Literal["max"], ...] = Field(default=(2048,), min_length=1)
    """Metrics "kl@<window>", "kl_p99@<window>", "top1_agreement@<window>" and "ppl_ratio@<window>" for each."""


def check(config: Config) -> None:
    """Raise EvaluationError for what the suite perplexity refuses, and for figures per word or byte."""
    perplexity.check(config)
    if config.normalise:
        raise EvaluationError(
            f"normalise is {', '.join(config.normalise)}, but agreement knows figures per token only; set it to []"
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: Config,
    options: EvalOptions = EvalOptions(),
    *,
    reference: PreTrainedModel,
) -> SuiteResult:
    """Measure `model` against `reference`, the dense model, window length by window length; one sample per window.

    kl@W: mean KL(dense || model) per predicted token in nats, over the whole vocabulary in float32; lower is better.
    kl_p99@W: its 99th percentile over tokens, which has neither standard error nor samples. top1_agreement@W: share of
    tokens at which both would take the same next one. ppl_ratio@W: perplexity over that of the dense model; its samples
    are differences of mean negative log-likelihoods, in nats.

    Both models are run in this process, window by window: replicas are copies of one model only. For the errors raised
    see `evaluation.language_modeling.divergence` and `evaluation.language_modeling.windows`.
    """
    from evaluation.language_modeling.divergence import (
        agreements,
        check_comparable,
        divergence,
        divergence_quantile,
        perplexity_ratio,
        top1_agreement,
    )
    from evaluation.language_modeling.perplexity import longest_context
    from evaluation.language_modeling.windows import select_windows, windows_of

    check(config)
    check_comparable(model, reference)
    lengths = window_lengths(config.windows, longest_context(model))
    texts = data.texts(config.texts)
    metrics: list[Metric] = []
    samples: list[Sample] = []
    for done, window in enumerate(lengths):
        protocol = config.at(window)
        windows = select_windows(windows_of(tokenizer, texts, protocol), protocol)
        part = replace(options, progress=part_of(options.progress, done, done + 1, len(lengths)))
        results = agreements(model, reference, windows, part)
        figures = {
            "kl": divergence(results),
            "kl_p99": divergence_quantile(results, 0.99),
            "top1_agreement": top1_agreement(results),
            "ppl_ratio": perplexity_ratio(results),
        }
        metrics += metrics_of(config, window, figures, len(results))
        for each in results:
            scores = {
                f"kl@{window}": float(each.kl_K.mean(dtype="float64")),
                f"top1_agreement@{window}": float(each.same_K.mean()),
                f"ppl_ratio@{window}": float(each.lost_K.mean(dtype="float64")),
            }
            samples.append(sample_of(config, each.window, scores, tokenizer))
    taken = config.model_dump(mode="json") | {
        "stride": config.stride or "window (no overlap)",
        "tokenizer_adds_bos": adds_bos(tokenizer),
        "divergence": "KL(dense || model), nats per token",
        "dtype": str(model.dtype),
        "dense_dtype": str(reference.dtype),
    }
    return SuiteResult(EvalReport(suite="agreement", metrics=tuple(metrics), protocol=taken), tuple(samples))
