"""What a pruning step keeps: per layer its query heads, kv heads and MLP channels. No torch in here.

A plan applies to a model of known shapes (`source`), which may already be uneven; applying it gives a model of shapes
`plan.shapes`, to which a further plan may apply. Two plans in a row are one plan: `first.compose(then)`.

Words: query head h of a layer reads kv head h // (num_heads / num_kv_heads), as in `repeat_kv` of transformers. The
channels of a mixture of experts are counted through: channel c belongs to expert c // intermediate_size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from pruning.errors import PruningError


class LayerShape(BaseModel):
    """The widths of one decoder layer; without heads it has no attention, without channels no MLP.

    num_experts: of a mixture in the place of the MLP; each of them has intermediate_size channels. 0: an MLP.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_heads: NonNegativeInt
    num_kv_heads: NonNegativeInt
    intermediate_size: NonNegativeInt
    num_experts: NonNegativeInt = Field(default=0, exclude_if=lambda count: count == 0)

    @model_validator(mode="after")
    def _grouped(self) -> LayerShape:
        if self.num_heads == self.num_kv_heads == 0:
            return self
        if not self.num_kv_heads or not self.num_heads or self.num_heads % self.num_kv_heads:
            raise PruningError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} kv heads equally")
        return self

    @property
    def num_groups(self) -> int:
        """Query heads per kv head, 1 without grouping."""
        return self.num_heads // max(1, self.num_kv_heads) or 1

    @property
    def num_channels(self) -> int:
        """Channels of the MLP, or of all experts together."""
        return self.intermediate_size * max(1, self.num_experts)

    def kv_head_of(self, query_head: int) -> int:
        """The kv head that a query head reads."""
        return query_head // self.num_groups


class LayerPlan(BaseModel):
    """What is kept of one layer; indices count within that layer of the model the plan applies to.

    expert_size: channels of each expert of that layer, 0 for an MLP. Experts of which no channel is kept go as a whole,
    and all others keep the same number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: NonNegativeInt
    kept_query_heads: tuple[int, ...]
    kept_kv_heads: tuple[int, ...]
    kept_channels: tuple[int, ...]
    expert_size: NonNegativeInt = Field(default=0, exclude_if=lambda size: size == 0)

    @classmethod
    def full(cls, layer: int, shape: LayerShape) -> LayerPlan:
        """A layer that loses nothing."""
        return cls(
            layer=layer,
            kept_query_heads=tuple(range(shape.num_heads)),
            kept_kv_heads=tuple(range(shape.num_kv_heads)),
            kept_channels=tuple(range(shape.num_channels)),
            expert_size=shape.intermediate_size if shape.num_experts else 0,
        )

    @property
    def kept_by_expert(self) -> dict[int, tuple[int, ...]]:
        """By each expert that stays, the channels that it keeps, counted within it; empty for an MLP."""
        kept: dict[int, list[int]] = {}
        for channel in self.kept_channels if self.expert_size else ():
            kept.setdefault(channel // self.expert_size, []).append(channel % self.expert_size)
        return {expert: tuple(channels) for expert, channels in kept.items()}

    @property
    def shape(self) -> LayerShape:
        """The widths this layer has after pruning."""
        num_experts = len({channel // self.expert_size for channel in self.kept_channels}) if self.expert_size else 0
        return LayerShape(
            num_heads=len(self.kept_query_heads),
            num_kv_heads=len(self.kept_kv_heads),
            intermediate_size=len(self.kept_channels) // max(1, num_experts),
            num_experts=num_experts,
        )

    def compose(self, then: LayerPlan) -> LayerPlan:
        """This plan followed by `then`, whose indices count within the kept ones of this plan."""
        return LayerPlan(
            layer=self.layer,
            kept_query_heads=_take(self.kept_query_heads, then.kept_query_heads),
            kept_kv_heads=_take(self.kept_kv_heads, then.kept_kv_heads),
            kept_channels=_take(self.kept_channels, then.kept_channels),
            expert_size=self.expert_size,
        )

    def check(self, shape: LayerShape) -> None:
        """Raise PruningError unless this plan fits a layer of `shape` and leaves equal groups."""
        where = f"layer {self.layer}"
        _check_indices(self.kept_query_heads, shape.num_heads, f"{where}: kept_query_heads")
        _check_indices(self.kept_kv_heads, shape.num_kv_heads, f"{where}: kept_kv_heads")
        _check_indices(self.kept_channels, shape.num_channels, f"{where}: kept_channels")
        self._check_experts(shape, where)
        if bool(self.kept_query_heads) != bool(self.kept_kv_heads):
            raise PruningError(
                f"{where} keeps {len(self.kept_query_heads)} query and {len(self.kept_kv_heads)} kv heads: keep one of "
                "each, or none of either to drop the attention"
            )
        per_kv_head = Counter(shape.kv_head_of(head) for head in self.kept_query_heads)
        if orphans := sorted(set(per_kv_head) - set(self.kept_kv_heads)):
            raise PruningError(f"{where} keeps query heads of the removed kv heads {orphans}: remove those heads too")
        counts = {head: per_kv_head[head] for head in self.kept_kv_heads}
        if len(set(counts.values())) > 1:
            raise PruningError(
                f"{where} must keep the same number (at least 1) of query heads for every kept kv head, "
                f"not {counts} (kv head: query heads)"
            )

    def _check_experts(self, shape: LayerShape, where: str) -> None:
        if self.expert_size != (shape.intermediate_size if shape.num_experts else 0):
            raise PruningError(
                f"{where} has {shape.num_experts} experts of {shape.intermediate_size} channels, and its plan is for "
                f"expert_size {self.expert_size}: make the plan for this model"
            )
        if not shape.num_experts:
            return
        counts = {expert: len(channels) for expert, channels in self.kept_by_expert.items()}
        if not counts or len(set(counts.values())) > 1:
            raise PruningError(
                f"{where} must keep an expert, and the same number of channels of every expert that it keeps, not "
                f"{counts} (expert: channels): their weights are one tensor"
            )


class PruningPlan(BaseModel):
    """What is kept of a whole model. Layers absent from `layers` are dropped.

    source: the shapes of the model the plan applies to, one per layer.
    head_dim: width of one head, the same in all layers.
    layers: the kept layers in their original order.
    output_bias: whether every o_proj and down_proj gets a bias, which the model did not have before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: tuple[LayerShape, ...]
    head_dim: PositiveInt
    layers: tuple[LayerPlan, ...]
    output_bias: bool = False

    @model_validator(mode="after")
    def _fits(self) -> PruningPlan:
        if not self.layers:
            raise PruningError("a plan must keep at least one layer")
        _check_indices(tuple(kept.layer for kept in self.layers), len(self.source), "layers of the plan")
        for kept in self.layers:
            kept.check(self.source[kept.layer])
        if not self.layers[0].kept_kv_heads:
            raise PruningError(
                f"layer {self.layers[0].layer}, the first one that stays, keeps no attention head: the length of a KV "
                "cache is read from the first layer; keep a head there, or drop the whole layer"
            )
        return self

    @classmethod
    def full(cls, source: Sequence[LayerShape], head_dim: int) -> PruningPlan:
        """The plan that removes nothing."""
        layers = tuple(LayerPlan.full(index, shape) for index, shape in enumerate(source))
        return cls(source=tuple(source), head_dim=head_dim, layers=layers)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The shapes after pruning, one per kept layer."""
        return tuple(kept.shape for kept in self.layers)

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are removed as a whole."""
        kept = {plan.layer for plan in self.layers}
        return tuple(index for index in range(len(self.source)) if index not in kept)

    def compose(self, then: PruningPlan) -> PruningPlan:
        """One plan equal to this one followed by `then`; its indices are those of this plan's source.

        Raises PruningError if `then` was not made for the model that this plan leaves.
        """
        if then.source != self.shapes or then.head_dim != self.head_dim:
            raise PruningError(
                f"the second plan is for {describe_shapes(then.source)} (head_dim {then.head_dim}), "
                f"but the first leaves {describe_shapes(self.shapes)} (head_dim {self.head_dim})"
            )
        layers = tuple(self.layers[plan.layer].compose(plan) for plan in then.layers)
        output_bias = self.output_bias or then.output_bias
        return PruningPlan(source=self.source, head_dim=self.head_dim, layers=layers, output_bias=output_bias)


def describe_shapes(shapes: Sequence[LayerShape]) -> str:
    """Shapes in words for messages, equal neighbours counted: "2 layers of 8/4 heads x 64, 1 layer of ..."."""
    runs: list[tuple[LayerShape, int]] = []
    for shape in shapes:
        count = runs.pop()[1] if runs and runs[-1][0] == shape else 0
        runs.append((shape, count + 1))
    words = [
        f"{count} layer{'s' * (count > 1)} of {shape.num_heads}/{shape.num_kv_heads} heads x {_width(shape)}"
        for shape, count in runs[:4]
    ]
    return ", ".join(words) + (", ..." if len(runs) > 4 else "")


def _width(shape: LayerShape) -> str:
    return (
        f"{shape.num_experts} experts of {shape.intermediate_size}"
        if shape.num_experts
        else str(shape.intermediate_size)
    )


def _take(kept: tuple[int, ...], then: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(kept[index] for index in then)


def _check_indices(indices: tuple[int, ...], size: int, what: str) -> None:
    """Indices must rise strictly within [0, size)."""
    if outside := [index for index in indices if not 0 <= index < size]:
        raise PruningError(f"{what}: {outside[:5]} outside 0..{size - 1}")
    if any(a >= b for a, b in pairwise(indices)):
        raise PruningError(f"{what}: indices must be sorted and unique, got {indices[:20]}")
