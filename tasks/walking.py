"""How this machine runs the layer walk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.stage import Bench

if TYPE_CHECKING:
    from pruning.sequential import WalkOptions


def walk_options(bench: Bench) -> WalkOptions:
    """Device, batch size and memory budget from the settings."""
    from pruning.sequential import WalkOptions

    settings = bench.workplace.settings
    budget = settings.activation_budget_gib
    return WalkOptions(
        device=bench.place.device,
        batch_size=settings.walk_batch_size,
        activation_budget_bytes=None if budget is None else int(budget * 2**30),
    )
