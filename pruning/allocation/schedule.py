"""How much to remove where: from one asked sparsity to heads and channels per layer (SlimGPT, section 3.4).

The layer curve is the paper's Incremental Pruning Ratio; its scale is solved so that the parameters really removed meet
the asked share of all decoder-layer parameters. Pure arithmetic on integers, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pruning.allocation.budget import (
    Allocation,
    HeadUnit,
    LayerBudget,
    num_head_units,
    removed_parameters,
    split_ratios,
    unit_parameters,
)
from pruning.allocation.curves import MAX_RATIO, curve_ratios, curve_weights
from pruning.allocation.grid import EqualLayer, check_met, check_widths, equal_widths, round_to_multiples
from pruning.errors import PruningError
from pruning.families import LayerCost
from pruning.plan import LayerShape

#: how far the share that given end points remove may lie from the asked one
END_POINT_TOLERANCE = 0.002


def solve_budgets(shapes: Sequence[LayerShape], cost: LayerCost, allocation: Allocation) -> tuple[LayerBudget, ...]:
    """Head units and channels to remove from each layer, so that the parameters removed meet the asked sparsity.

    Heads are rounded to whole units along the curve; channels, being fine, make up the difference, so the count is met
    within one channel (within one head unit when only attention is pruned or the channels are at their limit). Given
    end points are rounded layer by layer and met as they are. On a grid (channel_multiple, uniform) it is met within
    half a percent. Raises PruningError when the sparsity cannot be reached, naming the most that can, or is not what
    the end points or the grid amount to, naming what is.
    """
    check_widths(shapes, allocation)
    if allocation.end_points is not None:
        return _given_budgets(shapes, cost, allocation, allocation.end_points)
    total = sum(cost.parameters(shape) for shape in shapes)
    wanted = allocation.sparsity * total
    weights = _protected(curve_weights(allocation.curve, len(shapes), allocation.start_over_end), allocation)
    attention, ffn = split_ratios(allocation.attention_ratio)
    check_reach(allocation, shapes, cost)
    if allocation.uniform:
        return _equal_budgets(shapes, cost, allocation)
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
        channels = _round_channels(shapes, cost, weights, wanted - head_parameters, allocation.channel_multiple)
    if allocation.head_rounding == "down":
        in_channels = sum(count * cost.channel_parameters(shape) for count, shape in zip(channels, shapes, strict=True))
        _check_made_up(head_parameters + in_channels, wanted, total, allocation)
    budgets = tuple(LayerBudget(h, c) for h, c in zip(heads, channels, strict=True))
    check_met(budgets, shapes, cost, allocation)
    return budgets


def _check_made_up(removed: int, wanted: float, total: int, allocation: Allocation) -> None:
    if removed < wanted - 0.005 * total:
        raise PruningError(
            f"sparsity {allocation.sparsity:g} cannot be reached with heads rounded down in each layer: channels make "
            f"up for it to {removed / total:.3f} only; lower sparsity, or set head_rounding to carry"
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


def check_grid(allocation: Allocation, shapes: Sequence[LayerShape], cost: LayerCost, *, threshold: bool) -> None:
    """Raise PruningError if the widths that channel_multiple and uniform ask for cannot be had, before any work.

    threshold: one threshold decides in the place of the curve.
    """
    if threshold and allocation.uniform:
        raise PruningError(
            "uniform keeps the same of every layer, and one threshold for all layers does not: take a method or an "
            "option that lets every layer lose the same ratio (allocation curve; of loraprune uniform; of flap "
            "structure UL-UM or UL-MM), or leave uniform out"
        )
    if threshold:
        check_widths(shapes, allocation)
    elif allocation.uniform or allocation.channel_multiple > 1:
        solve_budgets(shapes, cost, allocation)


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
        + _ratio(scale * weight * ffn) * shape.intermediate_size * cost.channel_parameters(shape)
        for weight, shape in zip(weights, shapes, strict=True)
    )


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


def _equal_budgets(shapes: Sequence[LayerShape], cost: LayerCost, allocation: Allocation) -> tuple[LayerBudget, ...]:
    shape, unit = shapes[0], allocation.head_unit
    attention, ffn = split_ratios(allocation.attention_ratio)
    total, units = cost.parameters(shape), num_head_units(shape, unit)
    wanted = allocation.sparsity * total
    scale = _bisect(lambda scale: _removed(scale, (1.0,), (shape,), cost, allocation), wanted)
    exact = _head_ratio(scale * attention, shape, unit) * units
    heads_per_unit = shape.num_heads // max(1, units)
    allowed = tuple(gone for gone in range(max(1, units)) if cost.builds(shape.num_heads - gone * heads_per_unit))
    layer = EqualLayer(
        units,
        unit_parameters(shape, cost, unit),
        shape.intermediate_size,
        cost.channel_parameters(shape),
        total,
        allowed,
    )
    found = equal_widths(
        layer, allocation.sparsity, exact, allocation.channel_multiple, attention=attention > 0, ffn=ffn > 0
    )
    return (LayerBudget(*found),) * len(shapes)


def _attention_parameters(shape: LayerShape, cost: LayerCost, head_unit: HeadUnit) -> int:
    return num_head_units(shape, head_unit) * unit_parameters(shape, cost, head_unit)


def _protected(weights: Sequence[float], allocation: Allocation) -> tuple[float, ...]:
    last = len(weights) - allocation.protect_last
    return tuple(w if allocation.protect_first <= i < last else 0.0 for i, w in enumerate(weights))


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
    shapes: Sequence[LayerShape], cost: LayerCost, weights: Sequence[float], wanted: float, multiple: int = 1
) -> list[int]:
    """Channels per layer along the curve that remove `wanted` parameters in all, to within half a channel, or half a
    multiple."""

    def exact(scale: float) -> list[float]:
        return [_ratio(scale * w) * shape.intermediate_size for w, shape in zip(weights, shapes, strict=True)]

    # of experts one channel of each goes at once
    at_once = [max(1, shape.num_experts) for shape in shapes]

    def removed(scale: float) -> float:
        return sum(value * count for value, count in zip(exact(scale), at_once, strict=True)) * cost.per_channel

    if wanted <= 0 and multiple == 1:
        return [0] * len(shapes)
    wanted = min(
        max(0.0, wanted), removed(1e6)
    )  # heads may have been rounded down where the channels are at their limit
    values = exact(_bisect(removed, wanted))
    if multiple > 1:
        widths = [shape.intermediate_size for shape in shapes]
        return round_to_multiples(
            widths, [v if w > 0 and n else None for v, w, n in zip(values, weights, widths, strict=True)], multiple
        )
    counts: list[int] = []
    carried = 0.0
    for value, together in zip(values, at_once, strict=True):
        count = max(0, round(value + carried / together)) if value > 0 else 0
        counts.append(count)
        carried += (value - count) * together
    return counts
