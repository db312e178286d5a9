"""Perplexity on a text data set at several window lengths; WikiText-2 raw test by default, as in the papers' tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from evaluation.bounds import Count
from evaluation.inference.options import EvalOptions, part_of
from evaluation.inference.prompts import adds_bos
from evaluation.language_modeling.presets import expanded
from evaluation.language_modeling.protocol import WindowSelection, check_consistent, refuse_twice, window_lengths
from evaluation.report import EvalReport, Metric
from evaluation.significance.verdicts import Figure
from evaluation.suite import DataNeed, ModelFacts, SuiteData, SuiteResult, TextNeed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.language_modeling.perplexity import Perplexity
    from evaluation.language_modeling.windows import Window
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
    any part can be set otherwise."""

    config: str | None = "wikitext-2-raw-v1"
    """For a data set that is named, None if it is not set."""

    split: str = "test"
    """For a single file that is named, train if it is not set."""

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
        """The texts, as `SuiteData.texts` and the preflight ask for them."""
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
    from evaluation.language_modeling.perplexity import longest_context, perplexity

    # All lengths first: a window that cannot fit must not cost the time of the ones before it.
    lengths = window_lengths(config.windows, longest_context(model))
    check_consistent(config, lengths)
    texts = data.texts(config.texts)
    metrics: list[Metric] = []
    samples: list[Sample] = []
    amounts: dict[str, JsonValue] = {}
    for done, window in enumerate(lengths):
        part = replace(options, progress=part_of(options.progress, done, done + 1, len(lengths)))
        result = perplexity(model, tokenizer, texts, config.at(window), part)
        figures = {"ppl": Figure(result.ppl, result.stderr), **result.normalised}
        metrics += metrics_of(config, window, figures, len(result.scored))
        for each in result.scored:
            nll = each.nll / len(each.window.targets)
            samples.append(sample_of(config, each.window, {f"ppl@{window}": nll}, tokenizer))
        amounts[str(window)] = _amounts(result)
    taken = config.model_dump(mode="json") | {
        "stride": config.stride or "window (no overlap)",
        "tokenizer_adds_bos": adds_bos(tokenizer),
        "measured": amounts,
        "dtype": str(model.dtype),
    }
    return SuiteResult(EvalReport(suite="perplexity", metrics=tuple(metrics), protocol=taken), tuple(samples))


def task_name(config: Config) -> str:
    """Short name of the data: "wikitext-2-raw-v1", "c4-en", "ptb_text_only"."""
    name = PurePath(config.dataset).name
    for suffix in (".txt", ".jsonl", ".parquet"):
        name = name.removesuffix(suffix)
    if config.config is None or config.config.startswith(name):
        return config.config or name
    return f"{name}-{config.config}"


def metrics_of(config: Config, window: int, figures: Mapping[str, Figure], num_windows: int) -> list[Metric]:
    """One metric "<name>@<window>" for each of the figures."""
    return [
        Metric(
            task=task_name(config),
            metric=f"{name}@{window}",
            value=figure.value,
            stderr=figure.stderr,
            num_examples=num_windows,
            higher_is_better=figure.higher_is_better,
        )
        for name, figure in figures.items()
    ]


def sample_of(config: Config, window: Window, scores: dict[str, float], tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The sample of a window: its weight is the number of predicted tokens, its prompt what it begins with."""
    from evaluation.samples import Sample

    return Sample(
        task=task_name(config),
        item=window.number,
        item_hash=window.content,
        scores=scores,
        weight=float(len(window.targets)),
        prompt=tokenizer.decode(window.inputs[:_SHOWN_TOKENS].tolist()),
    )


def _amounts(result: Perplexity) -> dict[str, JsonValue]:
    """How much was measured: a figure per word means little without the number of words."""
    amounts: dict[str, JsonValue] = {"windows": len(result.scored), "tokens": result.num_tokens}
    if result.num_words:
        amounts["words"] = result.num_words
    if result.num_bytes:
        amounts["bytes"] = result.num_bytes
    return amounts
