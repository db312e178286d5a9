"""Where something can be removed: the output linear of an attention (heads) and of an MLP (channels), in every layer;
of a layer with experts that of each.

Shapes: N groups, D input columns of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pruning.families.forward import KINDS, SubLayerKind, output_name

if TYPE_CHECKING:
    from pruning.families.family import ModelFamily
    from pruning.plan import LayerShape

GroupUnit = Literal["kv_group", "query_head", "channel"]


@dataclass(frozen=True)
class Site:
    """One output linear and what goes from it at once.

    layer, kind, name, expert: which linear. shape: of its layer. unit: what a group is. columns_ND: the input columns
    of each group. at_once: groups that a budget counts as one (of query heads one goes from every kv group).
    """

    layer: int
    kind: SubLayerKind
    name: str
    shape: LayerShape
    unit: GroupUnit
    columns_ND: Tensor
    at_once: int = 1
    expert: int | None = None

    @property
    def num_groups(self) -> int:
        """Groups in all."""
        return len(self.columns_ND)


def sites_of(
    family: ModelFamily, layer: int, shape: LayerShape, head_dim: int, head_unit: Literal["kv_group", "query_head"]
) -> Iterator[Site]:
    """The attention's site and the MLP's of one layer, or those of its experts."""
    for kind in KINDS:
        name = output_name(family, layer, kind)
        if kind == "mlp" and shape.num_experts:
            for expert in range(shape.num_experts):
                name = output_name(family, layer, kind, expert)
                yield Site(layer, kind, name, shape, "channel", channel_columns(shape), expert=expert)
        elif kind == "mlp":
            yield Site(layer, kind, name, shape, "channel", channel_columns(shape))
        else:
            at_once = 1 if head_unit == "kv_group" else shape.num_kv_heads
            yield Site(layer, kind, name, shape, head_unit, head_columns(shape, head_dim, head_unit), at_once)


def head_columns(shape: LayerShape, head_dim: int, head_unit: Literal["kv_group", "query_head"]) -> Tensor:
    """Columns of o_proj by kv group or by query head, (N, D) int64."""
    columns_I = torch.arange(shape.num_heads * head_dim)
    if head_unit == "kv_group":
        return columns_I.reshape(shape.num_kv_heads, shape.num_groups * head_dim)
    return columns_I.reshape(shape.num_heads, head_dim)


def channel_columns(shape: LayerShape) -> Tensor:
    """Columns of down_proj (of one expert's), each a group of its own, (N, 1) int64."""
    return torch.arange(shape.intermediate_size).unsqueeze(1)
