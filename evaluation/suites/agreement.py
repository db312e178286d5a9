"""KL divergence and top-1 agreement with the dense model on a text data set; WikiText-2 raw test by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from evaluation.bounds import Count
from evaluation.errors import EvaluationError
from evaluation.inference.options import EvalOptions, Progress
from evaluation.language_modeling.protocol import WindowProtocol, WindowSelection, window_lengths
from evaluation.report import EvalReport, Metric
from evaluation.suite import SuiteData, SuiteResult
from evaluation.suites import perplexity
from evaluation.suites.perplexity import check_model, needs, task_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.language_modeling.divergence import Agreement
    from evaluation.samples import Sample

__all__ = ["COMPARES", "IMPORTS", "VERSION", "Config", "check", "check_model", "evaluate", "needs", "task_name"]

VERSION = 2
IMPORTS = ("evaluation.language_modeling.divergence",)

COMPARES = True
"""`evaluate` takes the dense model as `reference`: both are in memory at once."""

_SHOWN_TOKENS = 24


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

    Both models are run here, by turns: a crew has copies of one model only. For the errors raised
    see `evaluation.language_modeling.divergence` and `evaluation.language_modeling.windows`.
    """
    from evaluation.language_modeling.divergence import agreements, check_comparable
    from evaluation.language_modeling.perplexity import longest_context
    from evaluation.language_modeling.token_streams import adds_bos
    from evaluation.language_modeling.windows import select_windows, windows_of

    check(config)
    check_comparable(model, reference)
    lengths = window_lengths(config.windows, longest_context(model))
    texts = data.texts(config.texts)
    metrics: list[Metric] = []
    samples: list[Sample] = []
    for done, window in enumerate(lengths):
        protocol = _protocol(config, window)
        windows = select_windows(windows_of(tokenizer, texts, protocol), protocol)
        part = replace(options, progress=_part(options.progress, done, len(lengths)))
        found = agreements(model, reference, windows, part)
        metrics += _metrics(config, window, found)
        samples += [_sample(config, window, each, tokenizer) for each in found]
    said = config.model_dump(mode="json") | {
        "stride": config.stride or "window (no overlap)",
        "tokenizer_adds_bos": adds_bos(tokenizer),
        "divergence": "KL(dense || model), nats per token",
        "dtype": str(model.dtype),
        "dense_dtype": str(reference.dtype),
    }
    return SuiteResult(EvalReport(suite="agreement", metrics=tuple(metrics), protocol=said), tuple(samples))


def _metrics(config: Config, window: int, found: Sequence[Agreement]) -> list[Metric]:
    from evaluation.language_modeling.divergence import (
        divergence,
        divergence_quantile,
        perplexity_ratio,
        top1_agreement,
    )

    figures = {
        "kl": divergence(found),
        "kl_p99": divergence_quantile(found, 0.99),
        "top1_agreement": top1_agreement(found),
        "ppl_ratio": perplexity_ratio(found),
    }
    return [
        Metric(
            task=task_name(config),
            metric=f"{name}@{window}",
            value=figure.value,
            stderr=figure.stderr,
            num_examples=len(found),
            higher_is_better=name == "top1_agreement",
        )
        for name, figure in figures.items()
    ]


def _sample(config: Config, window: int, found: Agreement, tokenizer: PreTrainedTokenizerBase) -> Sample:
    from evaluation.samples import Sample

    return Sample(
        task=task_name(config),
        item=found.window.number,
        item_hash=found.window.content,
        scores={
            f"kl@{window}": float(found.kl_K.mean(dtype="float64")),
            f"top1_agreement@{window}": float(found.same_K.mean()),
            f"ppl_ratio@{window}": float(found.lost_K.mean(dtype="float64")),
        },
        weight=float(found.num_tokens),
        prompt=tokenizer.decode(found.window.inputs[:_SHOWN_TOKENS].tolist()),
    )


def _protocol(config: Config, window: int) -> WindowProtocol:
    selection = {name: getattr(config, name) for name in WindowSelection.model_fields}
    return WindowProtocol(window=window, **selection)


def _part(progress: Progress, index: int, count: int) -> Progress:
    return lambda share, message: progress((index + share) / count, message)
