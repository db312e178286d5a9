"""The contract of suites: what every module in `evaluation/suites` is given and gives.

A suite offers `VERSION`, `IMPORTS` (the heavy modules that it needs), `Config`, `needs(config)`, `check(config)`,
`check_model(config, facts)` and `evaluate(model, tokenizer, data, config, options)`, which gives a SuiteResult. One of
lm-eval's tasks has `definitions(config)` too, so that their data can be looked at before work begins. With
`COMPARES = True` it measures against the dense model, and its `evaluate` takes that too, as `reference`. Nothing here
imports torch: a run can be planned without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel

if TYPE_CHECKING:
    from evaluation.report import EvalReport
    from evaluation.samples import Sample


@dataclass(frozen=True)
class SuiteResult:
    """The figures of a suite, and what they are the averages of."""

    report: EvalReport
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is loaded; None: it is not known.

    max_position_embeddings: tokens. has_chat_template: of its tokenizer.
    """

    max_position_embeddings: int | None = None
    has_chat_template: bool | None = None


class SuiteConfig(BaseModel, frozen=True, extra="forbid"):
    """Base of every suite's Config: frozen, unknown keys refused."""


class DataNeed(BaseModel, frozen=True, extra="forbid"):
    """One split that a suite reads: enough for a preflight to look for it and for a cache key to name it."""

    repo_id: str
    config: str | None = None
    split: str
    revision: str | None = None


class TextNeed(BaseModel, frozen=True, extra="forbid"):
    """The texts of one column: of a split, or of `data_files` inside the data set instead. revision: of the hub."""

    dataset: str
    config: str | None
    split: str
    text_field: str
    data_files: str | None = None
    revision: str | None = None


class SuiteData(Protocol):
    """Where a suite gets its data; the caller knows about mirrors and the hub, the suite does not."""

    def texts(self, need: TextNeed) -> list[str]:
        """One text per row, in the order of the data set."""
        ...

    def folder(self, repo_id: str) -> Path | None:
        """The local folder that stands for a data set of the hub, or None to load it from the hub itself."""
        ...

    def check(self, repo_id: str, excerpt: Path, config: str | None, splits: Sequence[str]) -> None:
        """Raise a ValueError that names the file and the reason if splits of a local folder cannot be read; `excerpt`
        is a folder with a README alone, which names the configuration and its files."""
        ...
