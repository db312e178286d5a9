"""Widths on a grid: what stays of every FFN a multiple, or every layer the same. Arithmetic on integers.

Odd widths lose the fast kernels of GPUs and the quantised types of llama.cpp, whose blocks are 32 wide; different ones
lose the stock classes, which build all layers equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pruning.allocation.budget import Allocation, LayerBudget, removed_parameters, split_ratios
from pruning.allocation.curves import MAX_RATIO
from pruning.errors import PruningError
from pruning.families import LayerCost
from pruning.families.family import EXPERT_MULTIPLE
from pruning.plan import LayerShape, describe_shapes

#: how far the share that is removed may lie from the asked one, where widths have to be multiples
TOLERANCE = 0.005


def round_to_multiples(widths: Sequence[int], exact: Sequence[float | None], multiple: int) -> list[int]:
    """Channels to remove from each layer, so that what stays is a multiple; what a layer is rounded by is carried
    on, and what the last ones cannot take is shared by all.

    widths: of the layers. exact: channels to remove as they were solved, None for a layer that is left whole.
    """
    kept: list[int] = []
    carried = left = 0.0
    for width, value in zip(widths, exact, strict=True):
        if value is None:
            kept.append(width)
            continue
        wanted = width - value - carried
        carried = multiple * round(wanted / multiple) - wanted
        kept.append(_nearest(width, wanted, multiple))
        left += kept[-1] - multiple * round(wanted / multiple)
    _spread_(kept, widths, [value is not None for value in exact], left + carried, multiple)
    return [width - left for width, left in zip(widths, kept, strict=True)]


def check_widths(shapes: Sequence[LayerShape], allocation: Allocation) -> None:
    """Raise PruningError if layers of these widths cannot be cut as channel_multiple and uniform ask for."""
    multiple, uniform = allocation.channel_multiple, allocation.uniform
    if multiple == 1 and not uniform:
        return
    word = "uniform" if uniform else "channel_multiple"
    if allocation.end_points is not None:
        raise PruningError(f"end_points give every layer its ratio, which {word} would round: leave one of them out")
    widths = [shape.intermediate_size for shape in shapes if shape.intermediate_size]
    if min(widths, default=multiple) < multiple:
        raise PruningError(
            f"channel_multiple {multiple} is more than the narrowest FFN has channels ({min(widths)}); take a divisor "
            "of its width"
        )
    if split_ratios(allocation.attention_ratio)[1] == 0 and any(width % multiple for width in widths):
        raise PruningError(
            f"split attention leaves the FFN as it is, and its width is no multiple of channel_multiple {multiple}: "
            "take another split, or a divisor of the width"
        )
    if uniform and (allocation.protect_first or allocation.protect_last):
        raise PruningError(
            "uniform keeps the same of every layer: leave protect_first and protect_last out, or uniform"
        )
    if uniform and multiple % EXPERT_MULTIPLE and any(shape.num_experts for shape in shapes):
        raise PruningError(
            "uniform makes a model that stock classes compute, and these take experts of a width that is a multiple of "
            f"{EXPERT_MULTIPLE}: set channel_multiple to {EXPERT_MULTIPLE} or a multiple of it (now {multiple})"
        )
    if uniform and len(set(shapes)) > 1:
        raise PruningError(
            f"uniform needs a model whose layers are equal, and this one has {describe_shapes(shapes)}: leave it out"
        )


def on_grid(
    budgets: Sequence[LayerBudget], shapes: Sequence[LayerShape], cost: LayerCost, allocation: Allocation
) -> tuple[LayerBudget, ...]:
    """The budgets with channels such that what stays is a multiple, in the layers from which any may go.

    Raises PruningError if that moves what goes too far from the asked sparsity.
    """
    if allocation.channel_multiple == 1:
        return tuple(budgets)
    check_widths(shapes, allocation)
    inside = range(allocation.protect_first, len(shapes) - allocation.protect_last)
    ffn = split_ratios(allocation.attention_ratio)[1] > 0
    exact = [
        float(budget.channels) if ffn and index in inside and shape.intermediate_size else None
        for index, (budget, shape) in enumerate(zip(budgets, shapes, strict=True))
    ]
    channels = round_to_multiples([shape.intermediate_size for shape in shapes], exact, allocation.channel_multiple)
    rounded = tuple(LayerBudget(each.head_units, count) for each, count in zip(budgets, channels, strict=True))
    check_met(rounded, shapes, cost, allocation, instead_of=budgets)
    return rounded


def check_met(
    budgets: Sequence[LayerBudget],
    shapes: Sequence[LayerShape],
    cost: LayerCost,
    allocation: Allocation,
    instead_of: Sequence[LayerBudget] | None = None,
) -> None:
    """Raise PruningError if multiples of channels have moved what goes too far from the asked sparsity, or from what
    would have gone without them."""
    if allocation.channel_multiple == 1 or split_ratios(allocation.attention_ratio)[1] == 0:
        return
    total, unit = sum(map(cost.parameters, shapes)), allocation.head_unit
    share, wanted = removed_parameters(budgets, shapes, cost, unit) / total, allocation.sparsity
    if instead_of is not None:
        wanted = removed_parameters(instead_of, shapes, cost, unit) / total
    if abs(share - wanted) > TOLERANCE:
        raise PruningError(
            f"sparsity {allocation.sparsity:g} cannot be met with channel_multiple {allocation.channel_multiple}: the "
            f"nearest is {share:.4f}; ask for that, or take a smaller multiple"
        )


@dataclass(frozen=True)
class EqualLayer:
    """One layer of a model whose layers are equal and are to stay so.

    head_units: what it has of them. per_unit, per_channel: parameters that go with one. channels: its FFN. total: all
    its parameters. units_allowed: how many units may go, in ascending order.
    """

    head_units: int
    per_unit: int
    channels: int
    per_channel: int
    total: int
    units_allowed: tuple[int, ...]


def equal_widths(
    layer: EqualLayer, sparsity: float, exact_units: float, multiple: int, *, attention: bool, ffn: bool
) -> tuple[int, int]:
    """Head units and channels that go from every layer, so that the share removed is `sparsity` within TOLERANCE.

    exact_units: head units that the split between attention and FFN speaks for: the two allowed numbers around it are
    tried, the nearer first, and the channels make up for it. attention, ffn: whether anything may go there.

    Raises PruningError, naming the nearest sparsity that there is, if none of them meets it.
    """
    wanted = sparsity * layer.total
    tried: list[tuple[float, int, int]] = []
    for units in _around(layer.units_allowed, exact_units) if attention else (0,):
        left = (wanted - units * layer.per_unit) / layer.per_channel
        channels = layer.channels - _nearest(layer.channels, layer.channels - left, multiple) if ffn else 0
        removed = units * layer.per_unit + channels * layer.per_channel
        if abs(removed - wanted) <= TOLERANCE * layer.total:
            return units, channels
        tried.append((removed / layer.total, units, channels))
    nearest, units, channels = min(tried, key=lambda each: abs(each[0] - sparsity))
    raise PruningError(
        f"sparsity {sparsity:g} cannot be met with equal layers: the nearest that this split and channel_multiple "
        f"{multiple} allow is {nearest:.4f} ({units} of {layer.head_units} head units and {channels} of "
        f"{layer.channels} channels of every layer); ask for that, for another split, or for a smaller channel_multiple"
    )


def _spread_(kept: list[int], widths: Sequence[int], free: Sequence[bool], left: float, multiple: int) -> None:
    """Take what is left to go, or give back what went too much: a multiple a layer and round, the widest first."""
    step, before = math.copysign(multiple, left), math.inf
    while multiple / 2 < abs(left) < before:
        before = abs(left)
        for index in sorted(range(len(widths)), key=lambda index: -kept[index]):
            changed = kept[index] - int(step)
            if abs(left) > multiple / 2 and free[index] and _nearest(widths[index], changed, multiple) == changed:
                kept[index] = changed
                left -= step


def _nearest(width: int, kept: float, multiple: int) -> int:
    """The multiple nearest to the wanted kept width that is not more than there is, and leaves the smallest share."""
    least = multiple * max(1, math.ceil((1 - MAX_RATIO) * width / multiple))
    return min(max(least, multiple * round(kept / multiple)), width // multiple * multiple)


def _around(allowed: Sequence[int], exact: float) -> tuple[int, ...]:
    """The allowed numbers next to `exact` on either side, the nearer first."""
    below = [number for number in allowed if number <= exact][-1:]
    above = [number for number in allowed if number > exact][:1]
    return tuple(sorted([*below, *above], key=lambda number: abs(number - exact)))
