"""How much to remove where: from one asked sparsity to heads and channels per layer (SlimGPT, section 3.4).

The layer curve is the paper's Incremental Pruning Ratio; its scale is solved so that the parameters really removed meet
the asked share of all decoder-layer parameters. Pure arithmetic on integers, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pruning.errors import PruningError
from pruning.families import LayerCost
from pruning.plan import LayerShape

Curve = Literal["log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease"]
HeadUnit = Literal["kv_group", "query_head"]
HeadRounding = Literal["carry", "down"]

#: attention ratio over FFN ratio in one layer, by the name of the split
ATTENTION_RATIOS = {"equal": 1.0, "half": 1 / 2, "third": 1 / 3, "ffn": 0.0, "attention": math.inf}
#: no sub-layer loses more than this share of its heads or channels
MAX_RATIO = 0.95
#: end points of the paper at 20 %: r_0 = 0.0625, r_31 = 0.25; the same proportion is kept at other sparsities
START_OVER_END = 0.25
#: how far the share that given end points remove may lie from the asked one
END_POINT_TOLERANCE = 0.002


@dataclass(frozen=True)
class LayerBudget:
    """What to remove from one layer: head units (see HeadUnit) and FFN channels."""

    head_units: int
    channels: int


@dataclass(frozen=True)
class Allocation:
    """The wanted shape of the cut.

    sparsity: share of all decoder-layer parameters to remove. curve: over depth. attention_ratio: ratio of attention
    over ratio of FFN in the same layer: 1 is the paper's equal split, 0 leaves attention alone, infinity leaves the
    FFN alone. protect_first, protect_last: layers left whole. head_unit: what goes at once (see head_unit_costs).
    end_points: ratios of the first and the last layer, taken as they are instead of solved from the sparsity, which
    they must then meet; start_over_end plays no part. head_rounding: whole units per layer by carrying the rounding
    error from layer to layer, or down in each layer alone; channels make up for it.
    """

    sparsity: float
    curve: Curve = "log_increase"
    start_over_end: float = START_OVER_END
    attention_ratio: float = 1.0
    protect_first: int = 0
    protect_last: int = 0
    head_unit: HeadUnit = "kv_group"
    end_points: tuple[float, float] | None = None
    head_rounding: HeadRounding = "carry"


def curve_weights(curve: Curve, num_layers: int, start_over_end: float = START_OVER_END) -> tuple[float, ...]:
    """Relative pruning ratio of each layer, 1 at the most pruned end; first layer first.

    log_increase: r_i = r_0 + (r_{n-1} - r_0) log(i + 1) / log(n), with i from 0; linear likewise with i / (n - 1).
    """
    if num_layers == 1 or curve == "uniform":
        return (1.0,) * num_layers
    rising = [start_over_end + (1 - start_over_end) * share for share in _shares(curve, num_layers)]
    return tuple(rising if curve.endswith("increase") else reversed(rising))


def curve_ratios(curve: Curve, num_layers: int, end_points: tuple[float, float]) -> tuple[float, ...]:
    """Pruning ratio of each layer between given ratios of the first and of the last one (section 3.4).

    A decreasing curve is the increasing one seen from the other end. Raises PruningError for ratios outside
    [0, MAX_RATIO] or a curve that does not lead from the first to the last.
    """
    first, last = end_points
    if not (0 <= first <= MAX_RATIO and 0 <= last <= MAX_RATIO):
        raise PruningError(f"end_points {end_points} are not ratios between 0 and {MAX_RATIO}; give two such ratios")
    if num_layers == 1 or curve == "uniform":
        if first != last:
            where = "a uniform curve" if num_layers > 1 else "a model of one layer"
            raise PruningError(f"end_points {end_points} differ, but {where} has one ratio; give it twice")
        return (first,) * num_layers
    rises = curve.endswith("increase")
    if first > last if rises else first < last:
        other = curve.replace("increase", "decrease") if rises else curve.replace("decrease", "increase")
        raise PruningError(f"curve {curve} does not lead from {first} to {last}; swap the end_points or take {other}")
    low, high = min(end_points), max(end_points)
    rising = [low + (high - low) * share for share in _shares(curve, num_layers)]
    return tuple(rising if rises else reversed(rising))


def solve_budgets(shapes: Sequence[LayerShape], cost: LayerCost, allocation: Allocation) -> tuple[LayerBudget, ...]:
    """Head units and channels to remove from each layer, so that the parameters removed meet the asked sparsity.

    Heads are rounded to whole units along the curve; channels, being fine, make up the difference, so the count is met
    within one channel (within one head unit when only attention is pruned or the channels are at their limit). Given
    end points are rounded layer by layer and met as they are. Raises PruningError when the sparsity cannot be reached,
    naming the most that can, or is not what the end points amount to, naming what is.
    """
    if allocation.end_points is not None:
        return _given_budgets(shapes, cost, allocation, allocation.end_points)
    total = sum(cost.parameters(shape) for shape in shapes)
    wanted = allocation.sparsity * total
    weights = _protected(curve_weights(allocation.curve, len(shapes), allocation.start_over_end), allocation)
    attention, ffn = split_ratios(allocation.attention_ratio)
    check_reach(allocation, shapes, cost)
    scale = _bisect(lambda scale: _removed(scale, weights, shapes, cost, allocation), wanted)
    ratios = [_head_ratio(scale * w * attention, s, allocation.head_unit) for w, s in zip(weights, shapes, strict=True)]
    if allocation.head_rounding == "down":
        heads = [int(r * num_head_units(s, allocation.head_unit) + 1e-9) for r, s in zip(ratios, shapes, strict=True)]
    else:
        heads = _round_heads(shapes, cost, ratios, allocation.head_unit)
    head_parameters = sum(
        count * unit_parameters(shape, cost, allocation.head_unit) for count, shape in zip(heads, shapes, strict=True)
    )
    channels = [0] * len(heads)
    if ffn:
        channels = _round_channels(shapes, cost, weights, wanted - head_parameters)
    if allocation.head_rounding == "down":
        _check_made_up(head_parameters + sum(channels) * cost.per_channel, wanted, total, allocation)
    return tuple(LayerBudget(h, c) for h, c in zip(heads, channels, strict=True))


def _check_made_up(removed: int, wanted: float, total: int, allocation: Allocation) -> None:
    if removed < wanted - 0.005 * total:
        raise PruningError(
            f"sparsity {allocation.sparsity:g} cannot be reached with heads rounded down in each layer: channels make "
            f"up for it to {removed / total:.3f} only; lower sparsity, or set head_rounding to carry"
        )


def check_head_unit(head_unit: HeadUnit, shapes: Sequence[LayerShape]) -> None:
    """Raise PruningError if query heads are to go one by one from groups of one."""
    if head_unit == "query_head" and any(shape.num_groups == 1 for shape in shapes if shape.num_heads):
        raise PruningError(
            "head_unit 'query_head' takes query heads from groups that share a kv head, and a layer of this model has "
            "one query head per kv head; use kv_group, which there means single heads"
        )


def check_reach(allocation: Allocation, shapes: Sequence[LayerShape], cost: LayerCost, *, joint: bool = False) -> None:
    """Raise PruningError if the sparsity cannot be reached.

    joint: attention and FFN may each lose all that can go, whatever attention_ratio says.
    """
    if joint:
        allocation = replace(allocation, attention_ratio=1.0)
    total = sum(cost.parameters(shape) for shape in shapes)
    most = _removed(1e6, _protected((1.0,) * len(shapes), allocation), shapes, cost, allocation)
    if most < allocation.sparsity * total:
        raise PruningError(
            f"sparsity {allocation.sparsity:g} cannot be reached: with this split and these protected layers at most "
            f"{most / total:.3f} of the decoder-layer parameters can go; lower sparsity, protect fewer layers or "
            f"choose another split"
        )


def _removed(
    scale: float,
    weights: Sequence[float],
    shapes: Sequence[LayerShape],
    cost: LayerCost,
    allocation: Allocation,
) -> float:
    """Parameters that go if each layer loses `scale` times its weight, as far as it can."""
    attention, ffn = split_ratios(allocation.attention_ratio)
    return sum(
        _head_ratio(scale * weight * attention, shape, allocation.head_unit)
        * _attention_parameters(shape, cost, allocation.head_unit)
        + _ratio(scale * weight * ffn) * shape.intermediate_size * cost.per_channel
        for weight, shape in zip(weights, shapes, strict=True)
    )


def removed_parameters(
    budgets: Sequence[LayerBudget], shapes: Sequence[LayerShape], cost: LayerCost, head_unit: HeadUnit
) -> int:
    """Decoder-layer parameters that these budgets take away."""
    return sum(
        budget.head_units * unit_parameters(shape, cost, head_unit) + budget.channels * cost.per_channel
        for budget, shape in zip(budgets, shapes, strict=True)
    )


def num_head_units(shape: LayerShape, head_unit: HeadUnit) -> int:
    """How many units attention has: kv groups, or query heads per kv group (one goes from every group at once)."""
    return shape.num_kv_heads if head_unit == "kv_group" or not shape.num_heads else shape.num_groups


def _shares(curve: Curve, num_layers: int) -> list[float]:
    """How far a rising curve has come at each layer: 0 at the first, 1 at the last; two layers at least."""
    if curve.startswith("log"):
        return [math.log(i + 1) / math.log(num_layers) for i in range(num_layers)]
    return [i / (num_layers - 1) for i in range(num_layers)]


def _given_budgets(
    shapes: Sequence[LayerShape], cost: LayerCost, allocation: Allocation, end_points: tuple[float, float]
) -> tuple[LayerBudget, ...]:
    """Each layer's own ratio of its head units and channels; nothing is carried from layer to layer."""
    ratios = _protected(curve_ratios(allocation.curve, len(shapes), end_points), allocation)
    attention, ffn = split_ratios(allocation.attention_ratio)
    unit = allocation.head_unit
    budgets = tuple(
        LayerBudget(
            round(_head_ratio(ratio * attention, shape, unit) * num_head_units(shape, unit)),
            round(ratio * ffn * shape.intermediate_size),
        )
        for ratio, shape in zip(ratios, shapes, strict=True)
    )
    total = sum(cost.parameters(shape) for shape in shapes)
    achieved = removed_parameters(budgets, shapes, cost, unit) / total
    if abs(achieved - allocation.sparsity) > END_POINT_TOLERANCE:
        raise PruningError(
            f"end_points {end_points} with curve {allocation.curve} and this split remove {achieved:.4f} of the "
            f"decoder-layer parameters, not sparsity {allocation.sparsity:g}; set sparsity to {achieved:.4f}, or leave "
            "end_points out so that they are solved"
        )
    return budgets


def unit_parameters(shape: LayerShape, cost: LayerCost, head_unit: HeadUnit) -> int:
    """Parameters that go with one head unit."""
    if head_unit == "kv_group":
        return cost.per_kv_head + shape.num_groups * cost.per_query_head
    return shape.num_kv_heads * cost.per_query_head


def _attention_parameters(shape: LayerShape, cost: LayerCost, head_unit: HeadUnit) -> int:
    return num_head_units(shape, head_unit) * unit_parameters(shape, cost, head_unit)


def _protected(weights: Sequence[float], allocation: Allocation) -> tuple[float, ...]:
    last = len(weights) - allocation.protect_last
    return tuple(w if allocation.protect_first <= i < last else 0.0 for i, w in enumerate(weights))


def split_ratios(attention_ratio: float) -> tuple[float, float]:
    """Relative ratios of attention and FFN, the larger one 1."""
    if math.isinf(attention_ratio):
        return 1.0, 0.0
    largest = max(1.0, attention_ratio)
    return attention_ratio / largest, 1.0 / largest


def _ratio(value: float) -> float:
    return min(value, MAX_RATIO)


def _head_ratio(value: float, shape: LayerShape, head_unit: HeadUnit) -> float:
    # one unit always stays: of three kv groups at most two can go, whatever the curve says
    units = num_head_units(shape, head_unit)
    return min(_ratio(value), (units - 1) / units) if units else 0.0


def _bisect(function: Callable[[float], float], wanted: float) -> float:
    """The scale in [0, 1e6] where the increasing function reaches `wanted`."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return high


def _round_heads(
    shapes: Sequence[LayerShape], cost: LayerCost, ratios: Sequence[float], head_unit: HeadUnit
) -> list[int]:
    """Whole units per layer: the rounding error of earlier layers is carried on, in parameters; one always stays."""
    counts: list[int] = []
    carried = 0.0
    for shape, ratio in zip(shapes, ratios, strict=True):
        unit, units = unit_parameters(shape, cost, head_unit), num_head_units(shape, head_unit)
        exact = ratio * units * unit
        count = min(max(0, round((exact + carried) / unit)), units - 1) if ratio > 0 else 0
        counts.append(count)
        carried += exact - count * unit
    return counts


def _round_channels(
    shapes: Sequence[LayerShape], cost: LayerCost, weights: Sequence[float], wanted: float
) -> list[int]:
    """Channels per layer along the curve that remove `wanted` parameters in all, to within half a channel."""

    def exact(scale: float) -> list[float]:
        return [_ratio(scale * w) * shape.intermediate_size for w, shape in zip(weights, shapes, strict=True)]

    def removed(scale: float) -> float:
        return sum(exact(scale)) * cost.per_channel

    if wanted <= 0:
        return [0] * len(shapes)
    wanted = min(wanted, removed(1e6))  # heads may have been rounded down where the channels are at their limit
    counts: list[int] = []
    carried = 0.0
    for value in exact(_bisect(removed, wanted)):
        count = max(0, round(value + carried)) if value > 0 else 0
        counts.append(count)
        carried += value - count
    return counts
