"""The greedy order of every linear of the dense model: one pass gives what goes first and what it costs at every level.

Greedy removal is nested, so with the dense model's Hessians (errors not propagated) one order serves every sparsity: a
sparsity takes the first so many groups of it and refits the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pruning.allocation.budget import HeadUnit, num_head_units
from pruning.allocation.curves import MAX_RATIO
from pruning.distributed import ProcessGroup
from pruning.families import shapes
from pruning.obs.elimination import dampen, prepare
from pruning.obs.groups import Groups, channel_groups, head_groups, search
from pruning.obs.rounds import nested_group_sizes
from pruning.orders import Order, Orders, Unit
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import walk_layers
from pruning.walk.sub_layer import SubLayer

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.obs.groups import Solver
    from pruning.plan import LayerShape
    from pruning.statistics.hessian import Statistics


def trace_orders(
    decoder: Decoder,
    statistics: Statistics,
    solver: Solver,
    folder: Path,
    options: WalkOptions,
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Write the order of every o_proj (by each head unit it has) and every down_proj into `folder`.

    No forward pass: the Hessians are those of the statistics. Of the solver, head_unit says nothing here.
    Raises PruningError when a Hessian cannot be inverted.
    """
    widths, head_dim = shapes(decoder.skeleton), decoder.family.head_dim(decoder.skeleton)
    nothing_NL = torch.empty(0, 1, dtype=torch.int64)
    for sub_layer in walk_layers(
        decoder, nothing_NL, replace(options, process_group=ProcessGroup()), statistics=statistics
    ):
        assert sub_layer.hessian is not None
        weight_OI = sub_layer.linear.weight
        system = dampen(
            sub_layer.name,
            weight_OI,
            sub_layer.hessian,
            dampening_frac=solver.dampening_frac,
            own_share=solver.own_share,
            scale_O=sub_layer.output_scale_O,
        )
        problem = prepare(system)
        by_unit = _groups(sub_layer, widths[sub_layer.layer], head_dim, solver)
        for number, (unit, groups) in enumerate(by_unit.items(), 1):
            found = search(problem, groups, solver, uses_up=number == len(by_unit))
            order = Order(
                order=found.order,
                rounds=found.rounds,
                errors=found.errors,
                condition=1.0 / problem.rcond,
            )
            Orders(folder).save(sub_layer.name, unit, order)
        if sub_layer.ends_layer:
            on_layer(sub_layer.layer)
        del sub_layer, system, problem  # before the next ones are there


def _groups(sub_layer: SubLayer, shape: LayerShape, head_dim: int, solver: Solver) -> dict[Unit, Groups]:
    """By unit: what may go, as far as any budget may ask for it."""
    if sub_layer.kind == "mlp":
        total = shape.intermediate_size
        count = min(total, math.ceil(MAX_RATIO * total) + 1)  # a budget is rounded
        groups = channel_groups(shape, count, solver)
        if solver.group_size is None:
            groups = replace(groups, sizes=tuple(nested_group_sizes(count, total)))
        return {"channel": groups}
    units: tuple[HeadUnit, ...] = ("kv_group", "query_head") if shape.num_groups > 1 else ("kv_group",)
    return {unit: head_groups(shape, head_dim, max(0, num_head_units(shape, unit) - 1), unit) for unit in units}
