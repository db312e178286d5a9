"""What no spec may hold, wherever in it: tokens and passwords, and names of data that lead out of the data set.

Asked of the plain values before they are typed, so that no error message of a later check can repeat a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from infra.secrets import place_of_secret
from infra.sources.safe_names import check_data_files, check_name, check_revision

_CHECKS: Mapping[str, Callable[[str | None], str | None]] = {
    "data_files": check_data_files,
    "config": check_name,
    "split": check_name,
    "revision": check_revision,
}


def refuse_unsafe(raw: Any) -> Any:
    """The plain values of a spec, as they are. Raises ValueError naming the key; a secret's value is not repeated."""
    place = place_of_secret(raw)
    if place is not None:
        raise ValueError(
            f"{place} holds a token or password; a spec is recorded and shown: take it out, and give it to the program "
            "that needs it as environment variable (HF_TOKEN, MLFLOW_TRACKING_PASSWORD, ...)"
        )
    for where, data in _data_sets(raw):
        for key, check in _CHECKS.items():
            if isinstance(data.get(key), str):
                try:
                    check(data[key])
                except ValueError as error:
                    raise ValueError(f"{where}.{key}".lstrip(".") + f": {error}") from error
    return raw


def _data_sets(raw: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping that names a data set, and where it stands."""
    if isinstance(raw, Mapping):
        if "dataset" in raw:
            yield place, raw
        for key, inner in raw.items():
            yield from _data_sets(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(raw, list | tuple):
        for index, inner in enumerate(raw):
            yield from _data_sets(inner, f"{place}.{index}".lstrip("."))
