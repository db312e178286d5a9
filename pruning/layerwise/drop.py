"""Dropping whole layers, attention and MLP apart, or experts; what stays is as it was, but for linear stand-ins.

Shapes: O outputs, I inputs of a down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pruning.families import layer_cost, shapes
from pruning.families.experts import channel_places, experts_module, mask_experts_
from pruning.families.forward import KINDS, SubLayerKind, output_name, silence_
from pruning.layerwise.prune import layer_plan
from pruning.plan import LayerPlan
from pruning.walk.state import LayerEntry, Pruned, SubLayerReport, WalkedLayer, WalkState

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.families import LayerCost
    from pruning.plan import LayerShape
    from pruning.walk.options import WalkOptions


@dataclass(frozen=True)
class StandIn:
    """New weights of a down_proj, (O, I), that stand in for the layers after it; and what they cost."""

    weight_OI: Tensor
    report: SubLayerReport


def drop_blocks(
    decoder: Decoder,
    dropped: Mapping[tuple[int, SubLayerKind], float],
    stand_ins: Mapping[int, StandIn],
    *,
    options: WalkOptions,
    walk_state: WalkState,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> Pruned:
    """Drop sub-layers, and layers of which none is left; the others are in walk_state, the decoder stays as it was.

    dropped: (layer, sub-layer) with the score that it went with. stand_ins: by the layer that gets them.
    """
    widths, cost, family = shapes(decoder.skeleton), layer_cost(decoder.skeleton), decoder.family
    for index in range(walk_state.layers_done, len(widths)):
        gone = [kind for kind in KINDS if (index, kind) in dropped]
        stand_in, layer = stand_ins.get(index), None
        if len(gone) < len(KINDS):
            layer = decoder.layer(index, options.device)
            for kind in gone:
                silence_(family, layer, kind)
            if stand_in is not None:
                weight = family.down_proj(layer).weight
                weight.data.copy_(stand_in.weight_OI.to(weight))
        reports = [_report(decoder, index, kind, widths[index], dropped) for kind in KINDS]
        if stand_in is not None:
            reports[KINDS.index("mlp")] = stand_in.report
        walk_state.decide(LayerEntry(plan=_kept(index, widths[index], gone), reports=tuple(reports)))
        walk_state.layer_done(WalkedLayer(index, layer, family))
        del layer  # before the next one is there
        progress((index + 1) / len(widths), f"layer {index + 1} of {len(widths)}")
    return _outcome(decoder, walk_state, widths, cost)


def drop_experts(
    decoder: Decoder,
    gone: Mapping[int, Mapping[int, float]],
    *,
    options: WalkOptions,
    walk_state: WalkState,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> Pruned:
    """Drop experts; all layers are in walk_state, the decoder stays as it was. gone: by layer, the experts that go with
    their scores."""
    widths, cost, family = shapes(decoder.skeleton), layer_cost(decoder.skeleton), decoder.family
    for index in range(walk_state.layers_done, len(widths)):
        layer, shape, dropped = decoder.layer(index, options.device), widths[index], gone.get(index, {})
        plan, reports = LayerPlan.full(index, shape), [_report(decoder, index, kind, shape, {}) for kind in KINDS]
        if dropped:
            kept = {expert: of for expert, of in plan.kept_by_expert.items() if expert not in dropped}
            experts = experts_module(family, layer)
            mask_experts_(experts, kept)
            size = shape.intermediate_size
            channels = tuple(place for expert, of in kept.items() for place in channel_places(expert, size, of))
            plan = plan.model_copy(update={"kept_channels": channels})
            reports[KINDS.index("mlp")] = SubLayerReport(
                layer=index,
                sub_layer="mlp",
                name=output_name(family, index, "mlp"),
                kept=len(kept),
                total=shape.num_experts,
                predicted_error=None,
                measured_error=None,
                score=sum(dropped.values()),
            )
        walk_state.decide(LayerEntry(plan=plan, reports=tuple(reports)))
        walk_state.layer_done(WalkedLayer(index, layer, family))
        del layer  # before the next one is there
        progress((index + 1) / len(widths), f"layer {index + 1} of {len(widths)}")
    return _outcome(decoder, walk_state, widths, cost)


def _outcome(decoder: Decoder, walk_state: WalkState, widths: Sequence[LayerShape], cost: LayerCost) -> Pruned:
    plan = walk_state.plan(widths, decoder.family.head_dim(decoder.skeleton))
    return Pruned(
        plan=plan,
        layers=tuple(report for entry in walk_state.entries for report in entry.reports),
        achieved_sparsity=1 - sum(map(cost.parameters, plan.shapes)) / sum(map(cost.parameters, widths)),
    )


def _kept(index: int, shape: LayerShape, gone: Collection[SubLayerKind]) -> LayerPlan | None:
    if len(gone) == len(KINDS):
        return None
    heads = () if "attention" in gone else tuple(range(shape.num_kv_heads))
    channels = () if "mlp" in gone else tuple(range(shape.num_channels))
    return layer_plan(index, shape, heads, channels, "kv_group")


def _report(
    decoder: Decoder,
    index: int,
    kind: SubLayerKind,
    shape: LayerShape,
    dropped: Mapping[tuple[int, SubLayerKind], float],
) -> SubLayerReport:
    total = shape.num_kv_heads if kind == "attention" else shape.num_channels
    name = output_name(decoder.family, index, kind)
    if (index, kind) not in dropped:
        return SubLayerReport(layer=index, sub_layer=kind, name=name, kept=total, total=total)
    return SubLayerReport(
        layer=index,
        sub_layer=kind,
        name=name,
        kept=0,
        total=total,
        predicted_error=None,
        measured_error=None,
        score=dropped[index, kind],
    )
