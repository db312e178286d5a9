"""What an allocation asks for and what it comes to: a cut in words, and head units and channels in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pruning.allocation.curves import START_OVER_END, Curve
from pruning.errors import PruningError
from pruning.families import LayerCost
from pruning.plan import LayerShape

HeadUnit = Literal["kv_group", "query_head"]
HeadRounding = Literal["carry", "down"]

#: attention ratio over FFN ratio in one layer, by the name of the split
ATTENTION_RATIOS = {"equal": 1.0, "half": 1 / 2, "third": 1 / 3, "ffn": 0.0, "attention": math.inf}


@dataclass(frozen=True)
class LayerBudget:
    """What to remove from one layer: head units (see HeadUnit) and FFN channels, of experts so many from each."""

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
    error from layer to layer, or down in each layer alone; channels make up for it. channel_multiple: of what every FFN
    keeps. uniform: every layer keeps the same heads and channels, in numbers that the stock class can build; the curve
    and head_rounding play no part.
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
    channel_multiple: int = 1
    uniform: bool = False


def num_head_units(shape: LayerShape, head_unit: HeadUnit) -> int:
    """How many units attention has: kv groups, or query heads per kv group (one goes from every group at once)."""
    return shape.num_kv_heads if head_unit == "kv_group" or not shape.num_heads else shape.num_groups


def unit_parameters(shape: LayerShape, cost: LayerCost, head_unit: HeadUnit) -> int:
    """Parameters that go with one head unit."""
    if head_unit == "kv_group":
        return cost.per_kv_head + shape.num_groups * cost.per_query_head
    return shape.num_kv_heads * cost.per_query_head


def split_ratios(attention_ratio: float) -> tuple[float, float]:
    """Relative ratios of attention and FFN, the larger one 1."""
    if math.isinf(attention_ratio):
        return 1.0, 0.0
    largest = max(1.0, attention_ratio)
    return attention_ratio / largest, 1.0 / largest


def removed_parameters(
    budgets: Sequence[LayerBudget], shapes: Sequence[LayerShape], cost: LayerCost, head_unit: HeadUnit
) -> int:
    """Decoder-layer parameters that these budgets take away."""
    return sum(
        budget.head_units * unit_parameters(shape, cost, head_unit) + budget.channels * cost.channel_parameters(shape)
        for budget, shape in zip(budgets, shapes, strict=True)
    )


def shape_left(shape: LayerShape, budget: LayerBudget, head_unit: HeadUnit) -> LayerShape:
    """The widths of a layer without experts that has lost so much; the last query heads take their kv heads along."""
    if head_unit == "kv_group":
        kv_heads = shape.num_kv_heads - budget.head_units
        heads = kv_heads * shape.num_groups
    else:
        heads = shape.num_heads - budget.head_units * shape.num_kv_heads
        kv_heads = shape.num_kv_heads if heads else 0
    channels = shape.intermediate_size - budget.channels
    return LayerShape(num_heads=heads, num_kv_heads=kv_heads, intermediate_size=channels)


def parameters_left(
    budgets: Sequence[LayerBudget], shapes: Sequence[LayerShape], cost: LayerCost, head_unit: HeadUnit
) -> int:
    """Decoder-layer parameters that stay of layers without experts; one that keeps no head and no channel goes as a
    whole, with its norms."""
    left = (shape_left(shape, budget, head_unit) for shape, budget in zip(shapes, budgets, strict=True))
    return sum(cost.parameters(shape) for shape in left if shape.num_heads or shape.intermediate_size)


def check_head_unit(head_unit: HeadUnit, shapes: Sequence[LayerShape]) -> None:
    """Raise PruningError if query heads are to go one by one from groups of one."""
    if head_unit == "query_head" and any(shape.num_groups == 1 for shape in shapes if shape.num_heads):
        raise PruningError(
            "head_unit 'query_head' takes query heads from groups that share a kv head, and a layer of this model has "
            "one query head per kv head; use kv_group, which there means single heads"
        )
