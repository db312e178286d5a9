"""Perplexity on a text data set at several window lengths; WikiText-2 raw test by default, as in the papers' tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from evaluation.bounds import Count
from evaluation.inference.options import EvalOptions, Progress
from evaluation.language_modeling.presets import expanded
from evaluation.language_modeling.protocol import (
    WindowProtocol,
    WindowSelection,
    check_consistent,
    refuse_twice,
    window_lengths,
)
from evaluation.report import EvalReport, Metric
from evaluation.suite import DataNeed, ModelFacts, SuiteData, SuiteResult, TextNeed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.language_modeling.perplexity import Perplexity, Scored
    from evaluation.samples import Sample

VERSION = 3
IMPORTS = ("evaluation.language_modeling.perplexity",)

_SHOWN_TOKENS = 24
"""So much of a window is kept with its sample, to be recognised by."""


class Config(WindowSelection):
    """The data and the window lengths; the fields of WindowSelection say how windows are cut and chosen."""

    dataset: str = "Salesforce/wikitext"
    """A data set's id on the hub, whatever else the caller's SuiteData can resolve (a folder, a file), or a preset:
    wikitext2, ptb, ptb-test, c4 and lm-eval-wikitext stand for the data and the protocol of the papers' code, of which
    any part can be said otherwise."""

    config: str | None = "wikitext-2-raw-v1"
    """For a data set that is named, None if nothing is said."""

    split: str = "test"
    """For a single file that is named, train if nothing is said."""

    text_field: str = "text"
    data_files: str | None = None
    """Files inside the data set to read instead of what belongs to config and split."""

    revision: str | None = Field(default=None, exclude_if=lambda revision: revision is None)
    """Branch, tag or commit on the hub."""

    windows: tuple[Annotated[Count, Field(ge=2)] | Literal["max"], ...] = Field(default=(128, 2048), min_length=1)
    """One metric "ppl@<window>" for each; tokens, BOS included. "max" is the model's max_position_embeddings, and the
    metric has the number."""

    @property
    def texts(self) -> TextNeed:
        """Which texts are read."""
        return TextNeed(**{name: getattr(self, name) for name in TextNeed.model_fields})

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return expanded(data) if isinstance(data, dict) else data


def needs(config: Config) -> tuple[DataNeed, ...]:
    """The one split that is read."""
    return (DataNeed(repo_id=config.dataset, config=config.config, split=config.split, revision=config.revision),)


def check(config: Config) -> None:
    """Raise EvaluationError for a length that is asked twice and for a protocol that contradicts itself."""
    refuse_twice(config.windows)
    check_consistent(config, [window for window in config.windows if window != "max"])


def check_model(config: Config, facts: ModelFacts) -> None:
    """Raise EvaluationError for windows longer than the model's context."""
    if facts.max_position_embeddings is not None:
        check_consistent(config, window_lengths(config.windows, facts.max_position_embeddings))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: Config,
    options: EvalOptions = EvalOptions(),
) -> SuiteResult:
    """Measure every window length; one sample for each window. Errors: as `evaluation.language_modeling.perplexity`.

    A sample's score is the window's mean negative log-likelihood in nats per predicted token, its weight their number.
    Words and bytes of a window are the same for every model with that tokenizer, so what is per word or byte has no
    score of its own: it differs between two models as ppl@W does.
    """
    from evaluation.language_modeling.perplexity import longest_context, score_windows, summary
    from evaluation.language_modeling.token_streams import adds_bos

    # All lengths first: a window that cannot fit must not cost the time of the ones before it.
    lengths = window_lengths(config.windows, longest_context(model))
    check_consistent(config, lengths)
    texts = data.texts(config.texts)
    metrics: list[Metric] = []
    samples: list[Sample] = []
    amounts: dict[str, JsonValue] = {}
    for done, window in enumerate(lengths):
        protocol = _protocol(config, window)
        share = replace(options, progress=_part(options.progress, done, len(lengths)))
        scored = score_windows(model, tokenizer, texts, protocol, share)
        result = summary(scored, protocol)
        metrics += _metrics(config, window, result)
        samples += [_sample(config, window, entry, tokenizer) for entry in scored]
        amounts[str(window)] = _amounts(result)
    said = config.model_dump(mode="json") | {
        "stride": config.stride or "window (no overlap)",
        "tokenizer_adds_bos": adds_bos(tokenizer),
        "measured": amounts,
        "dtype": str(model.dtype),
    }
    return SuiteResult(EvalReport(suite="perplexity", metrics=tuple(metrics), protocol=said), tuple(samples))


def task_name(config: Config) -> str:
    """Short name of the data: "wikitext-2-raw-v1", "c4-en", "ptb_text_only"."""
    name = PurePath(config.dataset).name
    for suffix in (".txt", ".jsonl", ".parquet"):
        name = name.removesuffix(suffix)
    if config.config is None or config.config.startswith(name):
        return config.config or name
    return f"{name}-{config.config}"


def _metrics(config: Config, window: int, result: Perplexity) -> list[Metric]:
    figures = [("ppl", result.ppl, result.stderr)]
    figures += [(figure.name, figure.value, figure.stderr) for figure in result.normalised]
    return [
        Metric(
            task=task_name(config),
            metric=f"{name}@{window}",
            value=value,
            stderr=stderr,
            num_examples=result.num_windows,
            higher_is_better=False,
        )
        for name, value, stderr in figures
    ]


def _sample(config: Config, window: int, scored: Scored, tokenizer: PreTrainedTokenizerBase) -> Sample:
    from evaluation.samples import Sample

    num_tokens = len(scored.window.targets)
    return Sample(
        task=task_name(config),
        item=scored.window.number,
        item_hash=scored.window.content,
        scores={f"ppl@{window}": scored.nll / num_tokens},
        weight=float(num_tokens),
        prompt=tokenizer.decode(scored.window.inputs[:_SHOWN_TOKENS].tolist()),
    )


def _amounts(result: Perplexity) -> dict[str, JsonValue]:
    """How much was measured: a figure per word means little without the number of words."""
    said: dict[str, JsonValue] = {"windows": result.num_windows, "tokens": result.num_tokens}
    if result.num_words:
        said["words"] = result.num_words
    if result.num_bytes:
        said["bytes"] = result.num_bytes
    return said


def _protocol(config: Config, window: int) -> WindowProtocol:
    selection = {name: getattr(config, name) for name in WindowSelection.model_fields}
    return WindowProtocol(window=window, **selection)


def _part(progress: Progress, index: int, count: int) -> Progress:
    return lambda share, message: progress((index + share) / count, message)
