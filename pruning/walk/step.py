"""One sub-layer on its way through the walk.

Shapes: B samples, L tokens per sample, I inputs of an output linear, K kept inputs, O its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pruning.activations.activations import Activations
from pruning.families.experts import experts_module
from pruning.families.forward import SubLayerKind, output_linear, output_name
from pruning.statistics.accumulator import Accumulator
from pruning.walk.experts import ExpertStatistics, Few
from pruning.walk.sub_layer import SubLayer

if TYPE_CHECKING:
    from pruning.families import ModelFamily
    from pruning.statistics.hessian import Statistics
    from pruning.walk.options import WalkOptions

#: share of a linear's inputs above which computing with all of them is cheaper than gathering the kept ones
_GATHER_SHARE = 0.7


@dataclass
class Step:
    """One sub-layer from the pass that captures its inputs to the one in which its output joins the stream.

    captures: whether a statistic of its inputs is taken. seen, held: what adds up the calibration and the held-out
    samples, experts_seen, experts_held the same of all experts; kept: the inputs, if they are not to be computed again.
    """

    layer: nn.Module
    index: int
    kind: SubLayerKind
    captures: bool
    seen: Accumulator | None = None
    held: Accumulator | None = None
    experts_seen: ExpertStatistics | None = None
    experts_held: ExpertStatistics | None = None
    kept: Activations | None = None


def linear_as_pruned(family: ModelFamily, step: Step) -> Callable[[Tensor], Tensor]:
    """The output linear; of one that was pruned, as a function that saves the work for removed inputs, where that is
    worth gathering the others."""
    linear = output_linear(family, step.layer, step.kind)
    if not step.captures:
        return linear
    kept_K = linear.weight.any(0).nonzero().squeeze(1)
    if len(kept_K) > _GATHER_SHARE * linear.in_features:
        return linear
    weight_OK = linear.weight[:, kept_K].contiguous()
    return lambda inputs_BLI: nn.functional.linear(inputs_BLI[..., kept_K], weight_OK, linear.bias)


def offered_experts(
    family: ModelFamily, step: Step, statistics: Statistics | None, options: WalkOptions, few: list[Few]
) -> Iterator[SubLayer]:
    """The output linears of a layer's experts, one after the other, with what was captured of each, now or earlier, or
    with nothing. few: takes those that saw few tokens."""
    count, name_of = experts_module(family, step.layer).num_experts, partial(output_name, family, step.index, "mlp")
    found, heldout = [None] * count, [None] * count
    if step.experts_seen is not None:
        found, with_few = step.experts_seen.finish(name_of, options.process_group)
        few += with_few
        if step.experts_held is not None:
            heldout = step.experts_held.finish(name_of, options.process_group, complete=False)[0]
        step.experts_seen = step.experts_held = None
    for expert in range(count):
        linear = output_linear(family, step.layer, "mlp", expert)
        given: tuple[Any, Any] = found.pop(0), heldout.pop(0)
        if statistics is not None:
            given = statistics.load(name_of(expert), options.device)
        offered = SubLayer(step.index, "mlp", name_of(expert), linear, *given, expert=expert, num_experts=count)
        del given
        yield offered
