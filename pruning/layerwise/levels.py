"""What every site of a model as it stands can be cut to, and what each level costs in loss: orders by Optimal Brain
Surgeon whose rows count as much as the loss minds them.

Shapes: O outputs of an output linear, C residual stream.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pruning.allocation.budget import num_head_units, unit_parameters
from pruning.allocation.knapsack import SiteLevels
from pruning.families.forward import SubLayerKind, output_linear, output_name, output_scale
from pruning.gradients.sensitivity import LayerSensitivity, walk_sensitivities
from pruning.obs.elimination import System, dampen, output_error, prepare
from pruning.obs.groups import Groups, Solver, channel_groups, head_groups, search
from pruning.obs.rounds import nested_group_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.checkpoints.decoder import Decoder
    from pruning.distributed import ProcessGroup
    from pruning.families import LayerCost, ModelFamily
    from pruning.gradients.sensitivity import Labels
    from pruning.plan import LayerShape
    from pruning.walk.options import WalkOptions

SiteName = tuple[int, SubLayerKind]


@dataclass(frozen=True)
class TracedSite:
    """order: the groups of the site in the order they go, as they are numbered now. counts: how many are gone at each
    of the levels. sensitivity: mean over tokens of the squared gradient at the output."""

    order: tuple[int, ...]
    counts: tuple[int, ...]
    levels: SiteLevels
    sensitivity: float

    def groups(self, parameters: int) -> int:
        """How many groups go with so many parameters."""
        place = bisect_right(self.levels.parameters, parameters) - 1
        finer = self.levels.finer or math.inf
        return self.counts[place] + int((parameters - self.levels.parameters[place]) // finer)


@dataclass(frozen=True)
class Tracing:
    """What is common to all sites. shapes: widths of all layers as they are now. free: the layers that may be cut.
    present: the sub-layers that a layer has."""

    shapes: Sequence[LayerShape]
    cost: LayerCost
    solver: Solver
    labels: Labels
    free: Collection[int]
    present: Callable[[int], Collection[SubLayerKind]]


def trace_levels(
    decoder: Decoder,
    input_ids_NL: Tensor,
    tracing: Tracing,
    options: WalkOptions,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[SiteName, TracedSite]:
    """The sites of the free layers in one walk backwards, one layer with its Hessians in memory at a time.

    Raises PruningError when a Hessian cannot be inverted, or a gradient is not finite.
    """
    family, head_dim = decoder.family, decoder.family.head_dim(decoder.skeleton)
    traced: dict[SiteName, TracedSite] = {}
    for found in walk_sensitivities(
        decoder,
        input_ids_NL,
        options,
        labels=tracing.labels,
        name_of=lambda layer, kind: output_name(family, layer, kind),
        present=tracing.present,
        progress=progress,
    ):
        if found.layer in tracing.free:
            traced |= _trace_layer(family, found, head_dim, tracing, options.process_group)
        del found  # before the next layer's Hessians are there
    return traced


def _trace_layer(
    family: ModelFamily, found: LayerSensitivity, head_dim: int, tracing: Tracing, process_group: ProcessGroup
) -> dict[SiteName, TracedSite]:
    """The sites of one layer; the leader of the group traces for all."""
    return {
        (found.layer, kind): process_group.decide(partial(_trace, family, found, kind, head_dim, tracing))
        for kind in found.sub_layers
    }


def _trace(
    family: ModelFamily, found: LayerSensitivity, kind: SubLayerKind, head_dim: int, tracing: Tracing
) -> TracedSite:
    linear, name = output_linear(family, found.module, kind), output_name(family, found.layer, kind)
    shape, cost, solver = tracing.shapes[found.layer], tracing.cost, tracing.solver
    sensitivity = found.sub_layers[kind]
    system = dampen(
        name,
        linear.weight.detach(),
        sensitivity.hessian,
        dampening_frac=solver.dampening_frac,
        own_share=solver.own_share,
        scale_O=loss_scale(output_scale(family, found.module, kind), sensitivity.gradient_C),
    )
    if kind == "attention":
        groups, at_once, parameters = _heads(shape, cost, head_dim, solver)
    else:
        groups, at_once = _channels(shape, solver), 1
        parameters = [count * cost.per_channel for count in range(shape.intermediate_size + 1)]
    elimination = search(prepare(system), groups, solver, uses_up=True)
    errors = dict(zip(elimination.rounds, elimination.errors, strict=True)) | {len(groups.columns_ND): _all(system)}
    counts = [0, *(count for count in elimination.rounds if count % at_once == 0)]
    if kind == "attention" and found.layer == 0:
        counts.pop()  # the length of a KV cache is read from the first layer
    levels = SiteLevels(
        parameters=tuple(parameters[count // at_once] for count in counts),
        losses=(0.0, *(errors[count] for count in counts[1:])),
        finer=cost.per_channel if kind == "mlp" else None,
    )
    return TracedSite(elimination.order, tuple(counts), levels, float(sensitivity.gradient_C.sum()))


def loss_scale(output_scale_O: Tensor | None, gradient_O: Tensor) -> Tensor:
    """How much each output counts, so that squared errors are the predicted rise of the loss in nats per token."""
    scale_O: Tensor = (gradient_O / 2).sqrt()
    return scale_O if output_scale_O is None else scale_O * output_scale_O.to(scale_O)


def _heads(shape: LayerShape, cost: LayerCost, head_dim: int, solver: Solver) -> tuple[Groups, int, list[int]]:
    """Groups, how many go at once, and the parameters that go with each number of units: with the last one all."""
    unit = solver.head_unit
    units, per_unit = num_head_units(shape, unit), unit_parameters(shape, cost, unit)
    parameters = [count * per_unit for count in range(units)]
    parameters.append(shape.num_heads * cost.per_query_head + shape.num_kv_heads * cost.per_kv_head)
    at_once = 1 if unit == "kv_group" else shape.num_kv_heads
    return head_groups(shape, head_dim, units, unit), at_once, parameters


def _channels(shape: LayerShape, solver: Solver) -> Groups:
    total = shape.intermediate_size
    groups = channel_groups(shape, total, solver)
    if solver.group_size is None:
        groups = replace(groups, sizes=tuple(nested_group_sizes(total, total)))
    return groups


def _all(system: System) -> float:
    """The error of removing the linear as a whole."""
    W_OI = system.counted(system.W_OI)
    return output_error(W_OI, W_OI.new_zeros(()).expand_as(W_OI), system.dampened())
