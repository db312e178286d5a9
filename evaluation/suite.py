"""What every module in `evaluation/suites` is given and gives: the words of the plug-in contract.

A suite offers `VERSION`, `Config`, `needs(config)`, `check(config)` and `evaluate(model, tokenizer, data, config, *,
batch_size, progress)`. Nothing here imports torch, so a run can be planned without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

Progress = Callable[[float, str], None]
"""Called with the share done in [0, 1] and a short message."""


def silent(share: float, message: str) -> None:
    """The progress of those who do not want to know."""


class SuiteConfig(BaseModel):
    """Base of every suite's Config: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataNeed(BaseModel):
    """One split that a suite reads: enough for a preflight to look for it and for a cache key to name it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo_id: str
    config: str | None = None
    split: str


class SuiteData(Protocol):
    """Where a suite gets its data; the caller knows about mirrors and the hub, the suite does not."""

    def texts(self, dataset: str, *, config: str | None, split: str, text_field: str) -> list[str]:
        """One text per row, in the order of the data set."""
        ...

    def folder(self, repo_id: str) -> Path | None:
        """The local folder that stands for a data set of the hub, or None to load it from the hub itself."""
        ...
