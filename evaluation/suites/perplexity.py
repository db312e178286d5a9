"""Perplexity on a text data set at several window lengths; WikiText-2 raw test by default, as in the papers' tables."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from evaluation.errors import EvaluationError
from evaluation.report import EvalReport, Metric
from evaluation.suite import DataNeed, Progress, SuiteData, silent
from evaluation.windows import WindowProtocol, WindowSelection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.perplexity import Perplexity

VERSION = 1


class Config(WindowSelection):
    """The data and the window lengths; the fields of WindowSelection say how windows are cut and chosen."""

    dataset: str = "Salesforce/wikitext"
    """A data set's id on the hub, or whatever else the caller's SuiteData can resolve (a local file)."""

    config: str | None = "wikitext-2-raw-v1"
    split: str = "test"
    text_field: str = "text"

    windows: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(128, 2048), min_length=1)
    """One metric "ppl@<window>" for each; tokens, BOS included."""


def needs(config: Config) -> tuple[DataNeed, ...]:
    """The one split that is read."""
    return (DataNeed(repo_id=config.dataset, config=config.config, split=config.split),)


def check(config: Config) -> None:
    """Raise EvaluationError if a window length is asked twice: both would be the same row."""
    if len(set(config.windows)) < len(config.windows):
        raise EvaluationError(f"windows {config.windows} names a length twice; name each once")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: Config,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
) -> EvalReport:
    """Measure every window length; see `evaluation.perplexity` for the errors raised."""
    from evaluation.perplexity import check_fits, perplexity

    # All lengths first: a window that cannot fit must not cost the time of the ones before it.
    for window in config.windows:
        check_fits(model, window)
    texts = data.texts(config.dataset, config=config.config, split=config.split, text_field=config.text_field)
    metrics = []
    for done, window in enumerate(config.windows):
        share = _part(progress, done, len(config.windows))
        result = perplexity(model, tokenizer, texts, _protocol(config, window), batch_size=batch_size, progress=share)
        metrics.append(_metric(config, window, result))
    protocol = config.model_dump(mode="json") | {"stride": "window (no overlap)", "dtype": str(model.dtype)}
    return EvalReport(suite="perplexity", metrics=tuple(metrics), protocol=protocol)


def task_name(config: Config) -> str:
    """Short name of the data: "wikitext-2-raw-v1", "c4-en", "ptb_text_only"."""
    name = PurePath(config.dataset).name
    for suffix in (".txt", ".jsonl", ".parquet"):
        name = name.removesuffix(suffix)
    if config.config is None or config.config.startswith(name):
        return config.config or name
    return f"{name}-{config.config}"


def _metric(config: Config, window: int, result: Perplexity) -> Metric:
    return Metric(
        task=task_name(config),
        metric=f"ppl@{window}",
        value=result.ppl,
        stderr=result.stderr,
        num_examples=result.num_windows,
        higher_is_better=False,
    )


def _protocol(config: Config, window: int) -> WindowProtocol:
    selection = {name: getattr(config, name) for name in WindowSelection.model_fields}
    return WindowProtocol(window=window, **selection)


def _part(progress: Progress, index: int, count: int) -> Progress:
    return lambda share, message: progress((index + share) / count, message)
