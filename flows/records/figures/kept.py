"""Which heads and channels are left of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flows.errors import SpecError
from flows.records.figures.inputs import Recorded, counted, labels_of, protocol_of
from infra.artifacts.store import ArtifactRef
from infra.errors import ArtifactMissing
from infra.figures.panels import Drawing, HeatMap, Panel
from tasks.recording.images import kept_panels, read_plan

if TYPE_CHECKING:
    from pruning.plan import PruningPlan

#: of so many checkpoints every head and channel is shown; of more the share of every layer
_IN_FULL = 4
#: of more layers a cell has no room for a number
_NUMBERED = 48


def kept(recorded: Recorded) -> Drawing | None:
    """Heads and channels of each checkpoint, or of many the share of each layer. SpecError if no plan is left."""
    entries = recorded.entries(lambda entry: entry.row.action == "prune")
    if not entries:
        return None
    labels, plans = labels_of(entries), {}
    for entry in entries:
        ref = ArtifactRef(kind="checkpoint", key=entry.row.checkpoint_key)
        try:
            plans[entry.row.checkpoint_key] = read_plan(recorded.artifacts.path(ref))
        except ArtifactMissing:
            continue
    if not plans:
        names = ", ".join(dict.fromkeys(name for entry in entries for name in entry.runs.values()))
        raise SpecError(
            f"the plans of {names} are not in the artifact store any more; what makes them again: slimline retry "
            f"{next(iter(entries[0].runs.values()))}"
        )
    gone = len(entries) - len(plans)
    notes = (
        "heads and channels are numbered as in the dense model; a layer without any is removed as a whole",
        *counted(gone, "left out: {} more checkpoints, whose folders are not in the artifact store any more"),
        *protocol_of([entry for entry in entries if entry.row.checkpoint_key in plans]),
    )
    if len(plans) <= _IN_FULL:
        rows = tuple(kept_panels(labels[key], plan) for key, plan in plans.items())
        return Drawing("Kept heads and channels", rows, notes)
    shares = {labels[key]: _shares(plan) for key, plan in plans.items()}
    panels = [_overview(shares, part, what) for part, what in enumerate(("attention heads", "FFN channels"))]
    return Drawing("Kept heads and channels of every layer", tuple((panel,) for panel in panels), notes)


def _shares(plan: PruningPlan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of every layer of the dense model: the share of heads, and that of channels, that is kept."""
    by_layer = {kept.layer: kept.shape for kept in plan.layers}
    shapes = [(shape, by_layer.get(index)) for index, shape in enumerate(plan.source)]
    heads = tuple((left.num_heads if left else 0) / max(1, shape.num_heads) for shape, left in shapes)
    channels = tuple((left.num_channels if left else 0) / max(1, shape.num_channels) for shape, left in shapes)
    return heads, channels


def _overview(shares: Mapping[str, tuple[tuple[float, ...], ...]], part: int, what: str) -> Panel:
    """Models of fewer layers than others end earlier."""
    deepest = max(len(each[part]) for each in shares.values())
    values = tuple(each[part] + (float("nan"),) * (deepest - len(each[part])) for each in shares.values())
    texts: tuple[tuple[str, ...], ...] = ()
    if deepest <= _NUMBERED:
        texts = tuple(tuple(f"{100 * value:.0f}" for value in each[part]) for each in shares.values())
    ends = tuple(f"{sum(each[part]) / len(each[part]):.0%}" for each in shares.values())
    step = 1 if deepest <= _NUMBERED else 8
    return Panel(
        f"{what} (numbers: % of the layer; at the right the mean)", "layer", "",
        heat=HeatMap(values, tuple(shares), "share that is kept", ends, texts),
        x_ticks=tuple((layer, str(layer)) for layer in range(0, deepest, step)),
        height=0.9 + 0.15 * len(shares),
    )  # fmt: skip
