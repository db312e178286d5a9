"""What MLflow 3.17 accepts (mlflow/utils/validation.py) and how its SQL stores change a number. Imports no mlflow."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from posixpath import normpath
from typing import TypeVar

MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_TAGS_PER_BATCH = 100
MAX_KEY_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_NAME_LENGTH = 250
MAX_DATASET_NAME_LENGTH = 500
MAX_DATASET_DIGEST_LENGTH = 36

T = TypeVar("T")


def accepted_keys(items: Mapping[str, T]) -> dict[str, T]:
    """The same values under keys that MLflow accepts: "acc,none" becomes "acc_none".

    Keys that would become equal are told apart by a hash, or two metrics would share one history.
    """
    accepted: dict[str, T] = {}
    for original in sorted(items):
        key = normpath(re.sub(r"[^\w.\-/ ]", "_", original).strip("/") or "_")
        if key in accepted or key == "." or key.startswith("..") or len(key) > MAX_KEY_LENGTH:
            key = f"{key[: MAX_KEY_LENGTH - 9].lstrip('./')}-{hashlib.sha256(original.encode()).hexdigest()[:8]}"
        accepted[key] = items[original]
    return accepted


def accepted_model_name(name: str) -> str:
    """A name for a registered model: MLflow refuses slashes and colons in it."""
    return re.sub(r"[^\w.-]", "-", name)


def accepted_checkpoint_name(name: str) -> str:
    """A name for a logged model, which unlike one for a registered model has no points, but may have other signs."""
    return re.sub(r"[/:.%\"']", "-", name) or "-"


def accepted_alias(alias: str) -> str:
    """An alias of a model's version: letters, digits, dashes and underscores."""
    return re.sub(r"[^\w-]", "_", alias)


def stored(value: float) -> str:
    """A metric value in a form that is equal before and after a SQL store, where infinity is the largest float."""
    return "nan" if value != value else repr(min(max(value, -sys.float_info.max), sys.float_info.max))


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
