"""Which checkpoints of a run get an alias in the model registry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from infra.results.rows import MetricRow
from tasks.recording.lineage import Lineage

LAST_GOOD = "last-good"


def aliases(lineages: Mapping[str, Lineage], metrics: Sequence[MetricRow], failed: bool) -> dict[str, str]:
    """Names of checkpoints by alias: `last-good` is the last of a run in which nothing failed, `best-20pct` the best
    of those of which 20 % were removed, by the first figure that all of them have."""
    found = {} if failed or not lineages else {LAST_GOOD: list(lineages)[-1]}
    amounts: dict[float, list[str]] = {}
    for name, lineage in lineages.items():
        if lineage.sparsity:
            amounts.setdefault(lineage.sparsity, []).append(name)
    for sparsity, names in amounts.items():
        if (best := _best(names, metrics)) is not None:
            found[f"best-{100 * sparsity:g}pct"] = best
    return found


def _best(names: Sequence[str], metrics: Sequence[MetricRow]) -> str | None:
    """None if there is no figure, other than of the profile, that was measured of all of them."""
    figures: dict[tuple[str, str, str], dict[str, MetricRow]] = {}
    for row in metrics:
        if row.checkpoint in names and row.suite != "profile" and not math.isnan(row.value):
            figures.setdefault((row.suite, row.task, row.metric), {})[row.checkpoint] = row
    for measured in figures.values():
        better = {row.higher_is_better for row in measured.values()}
        if len(measured) == len(names) and better in ({True}, {False}):
            choose = max if better == {True} else min
            return choose(names, key=lambda name: measured[name].value)
    return None
