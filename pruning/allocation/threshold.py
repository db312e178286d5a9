"""One threshold for all sites: what scores least goes first, wherever in the model it stands (FLAP, arXiv 2312.11983,
section 3.3, structure AL-AM).

Shapes: lists by layer; in each the scores in the order in which groups go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Literal

from pruning.allocation.budget import Allocation, LayerBudget, num_head_units, split_ratios, unit_parameters
from pruning.allocation.curves import MAX_RATIO
from pruning.allocation.grid import on_grid
from pruning.errors import PruningError
from pruning.families import LayerCost
from pruning.plan import LayerShape

if TYPE_CHECKING:
    from pruning.families.forward import SubLayerKind

Measure = Literal["score", "per_parameter", "standardised"]
"""What is compared between sites: the scores as they are, scores per parameter, or scores less their site's mean and
over its standard deviation."""


@dataclass(frozen=True)
class LayerScores:
    """What each level costs, in the order of removal: heads one by one ("kv_group": groups), channels one by one, of
    experts one of each."""

    attention: tuple[float, ...]
    mlp: tuple[float, ...]


@dataclass(frozen=True)
class _Candidate:
    """One group that may go. key: what it is compared by; it never falls along the order of its site."""

    key: float
    layer: int
    kind: SubLayerKind
    level: int
    parameters: int


def threshold_budgets(
    scores: Sequence[LayerScores],
    shapes: Sequence[LayerShape],
    cost: LayerCost,
    allocation: Allocation,
    measure: Measure,
    *,
    joint: bool,
) -> tuple[LayerBudget, ...]:
    """Budgets that remove what scores least until the sparsity is met, to within half of the group that meets it.

    allocation: its sparsity, protected layers and head unit; with `joint` false also its attention_ratio, for which
    heads and channels have a threshold each. One head unit of a layer always stays, and of its channels the share that
    MAX_RATIO leaves. With a channel_multiple what a layer is rounded by is carried on to the next one.

    Raises PruningError if the sparsity cannot be reached.
    """
    total = sum(cost.parameters(shape) for shape in shapes)
    wanted = allocation.sparsity * total
    candidates = list(_candidates(scores, shapes, cost, allocation, measure))
    if joint:
        chosen = _cheapest(candidates, wanted, allocation, total)
    else:
        heads = [each for each in candidates if each.kind == "attention"]
        channels = [each for each in candidates if each.kind == "mlp"]
        chosen = _cheapest(heads, _share_of_heads(heads, channels, wanted, allocation), allocation, total)
        chosen += _cheapest(channels, wanted - sum(each.parameters for each in chosen), allocation, total)
    counts = {(layer, kind): 0 for layer in range(len(shapes)) for kind in ("attention", "mlp")}
    for each in chosen:
        counts[each.layer, each.kind] += 1
    budgets = tuple(LayerBudget(counts[layer, "attention"], counts[layer, "mlp"]) for layer in range(len(shapes)))
    return on_grid(budgets, shapes, cost, allocation)


def _candidates(
    scores: Sequence[LayerScores],
    shapes: Sequence[LayerShape],
    cost: LayerCost,
    allocation: Allocation,
    measure: Measure,
) -> Iterator[_Candidate]:
    for layer, (shape, of_layer) in enumerate(zip(shapes, scores, strict=True)):
        if not allocation.protect_first <= layer < len(shapes) - allocation.protect_last:
            continue
        units = num_head_units(shape, allocation.head_unit)
        per_unit = unit_parameters(shape, cost, allocation.head_unit)
        heads_at_once = 1 if allocation.head_unit == "kv_group" else shape.num_kv_heads
        sites: tuple[tuple[SubLayerKind, tuple[float, ...], int, int, int], ...] = (
            ("attention", of_layer.attention, heads_at_once, units - 1, per_unit),
            ("mlp", of_layer.mlp, 1, math.floor(MAX_RATIO * shape.intermediate_size), cost.channel_parameters(shape)),
        )
        for kind, one_by_one, at_once, most, parameters in sites:
            levels = _levels(one_by_one, at_once, parameters, measure)[: max(0, most)]
            # an order is nested: what stands behind a dear group cannot go before it
            for level, key in enumerate(accumulate(levels, max)):
                yield _Candidate(key, layer, kind, level, parameters)


def _levels(one_by_one: Sequence[float], at_once: int, parameters: int, measure: Measure) -> list[float]:
    """What each level is compared by; at_once: groups of one level."""
    if measure == "standardised" and len(one_by_one) > 1:
        mean, deviation = fmean(one_by_one), pstdev(one_by_one)
        one_by_one = [(score - mean) / deviation if deviation else 0.0 for score in one_by_one]
    sums = [sum(one_by_one[start : start + at_once]) for start in range(0, len(one_by_one), max(1, at_once))]
    return [each / (parameters if measure == "per_parameter" else max(1, at_once)) for each in sums]


def _share_of_heads(
    heads: Sequence[_Candidate], channels: Sequence[_Candidate], wanted: float, allocation: Allocation
) -> float:
    """Parameters that attention gives, so that its share removed is attention_ratio times that of the MLPs."""
    attention, ffn = split_ratios(allocation.attention_ratio)
    all_heads, all_channels = (sum(each.parameters for each in kind) for kind in (heads, channels))
    weight = attention * all_heads + ffn * all_channels
    return wanted * attention * all_heads / weight if weight else 0.0


def _cheapest(candidates: list[_Candidate], wanted: float, allocation: Allocation, total: int) -> list[_Candidate]:
    if wanted <= 0:
        return []
    most = sum(each.parameters for each in candidates)
    if most < wanted:
        raise PruningError(
            f"sparsity {allocation.sparsity:g} cannot be reached: with this split and these protected layers at most "
            f"{most / total:.3f} of the decoder-layer parameters can go; lower sparsity, protect fewer layers or "
            "choose another split"
        )
    ordered = sorted(candidates, key=lambda each: (each.key, each.layer, each.kind, each.level))
    gone = 0
    for count, each in enumerate(ordered):
        if gone + each.parameters >= wanted:
            nearer = gone + each.parameters - wanted <= wanted - gone
            return ordered[: count + nearer]
        gone += each.parameters
    return ordered
