"""Differences of the protocols of two measurements: those that forbid to compare figures, and those only reported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from infra.results.rows import MetricRow

_HARMLESS = frozenset({"bootstrap_iters"})
"""Options that change no figure, only the standard error of some."""

_OF_OTHER_FIGURES = frozenset({"windows", "normalise", "measured"})
"""Options that say which other figures there are: a figure has its window length in its name."""

_NOT_COMPARED = frozenset({"versions", "data_identity", "leaks"})
"""Installed versions are reported beside the figures, and so is training on what was measured; items are compared by
their own hashes, not by their source."""

Versions = Mapping[str, tuple[str | None, str | None]]
"""By library the versions of the two sides, None where none was recorded."""


def differences(mine: MetricRow, theirs: MetricRow) -> list[str]:
    """A phrase for each option that differs; none if a figure of the two may be compared."""
    return list(_differences(deciding(mine), deciding(theirs)))


def other_versions(mine: MetricRow, theirs: MetricRow) -> Versions:
    """The libraries whose versions are not the same, or recorded of one side only."""
    here, there = (json.loads(row.protocol).get("versions") or {} for row in (mine, theirs))
    pairs = {name: (here.get(name), there.get(name)) for name in {**here, **there}}
    return {name: both for name, both in pairs.items() if both[0] != both[1]}


def deciding(row: MetricRow) -> dict[str, Any]:
    """The options that must be the same for each single figure."""
    protocol: dict[str, Any] = json.loads(row.protocol)
    return {key: value for key, value in protocol.items() if key not in _OF_OTHER_FIGURES | _NOT_COMPARED}


def _differences(mine: Any, theirs: Any, place: str = "") -> Iterator[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [key for key in {**mine, **theirs} if key not in _HARMLESS]:
            yield from _differences(mine.get(key), theirs.get(key), f"{place}.{key}" if place else key)
    elif mine != theirs:
        yield f"{place} is {json.dumps(mine)} in the one and {json.dumps(theirs)} in the other"
