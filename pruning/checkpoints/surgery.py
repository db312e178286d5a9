"""Cutting a model to a plan. The only functions of `pruning` that change a model's shapes, both in place.

Row and column order: heads lie one after another in q/k/v rows and o_proj columns, head_dim wide each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.families import ModelFamily, family_of, shapes
from pruning.families.experts import cut_experts_, experts_of, mask_experts_
from pruning.families.forward import KINDS, SubLayerKind, output_linear, silence_
from pruning.families.head_norms import cut_head_norms_, head_features, mask_head_norms_
from pruning.families.parts import check_parts
from pruning.modeling import describe_
from pruning.modeling.modeling_slimline import own_heads_, without_heads_
from pruning.plan import LayerPlan, PruningPlan, describe_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def shrink_(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Remove from the model everything the plan does not keep.

    Afterwards every weight is a contiguous tensor of its own, dropped layers are gone, the others renumbered, and the
    model has the config and class that describe it: the stock class if all layers are equal, else a `Slimline...` class
    with `per_layer_config`; `model.save_pretrained(folder)` then writes a loadable checkpoint.

    Raises PruningError if the plan was made for other shapes, a linear is not a plain nn.Linear (quantised, offloaded,
    wrapped in an adapter) or a layer has a part that its family does not know.
    """
    family = family_of(model)
    _check_applies(model, family, plan)
    layers = family.layers(model)
    for kept in plan.layers:
        if plan.output_bias:
            give_output_bias_(family, layers[kept.layer])
        shrink_layer_(family, layers[kept.layer], kept)
    kept_layers = tuple(kept.layer for kept in plan.layers)
    _keep_layers_(layers, kept_layers)
    describe_(model, kept_layers, plan.shapes, output_bias=plan.output_bias)


@torch.no_grad()
def mask_(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Zero what the plan does not keep and leave all shapes: the masked model computes what the shrunk one does.

    A dropped layer becomes the identity: its o_proj and down_proj are zeroed. Raises PruningError as `shrink_` does.
    """
    family = family_of(model)
    _check_applies(model, family, plan)
    layers = family.layers(model)
    for kept in plan.layers:
        _mask_layer_(family, layers[kept.layer], kept, plan.head_dim)
    for index in plan.dropped_layers:
        for kind in KINDS:
            silence_(family, layers[index], kind)


def _check_applies(model: nn.Module, family: ModelFamily, plan: PruningPlan) -> None:
    for index, layer in enumerate(family.layers(model)):
        for linear in family.linears(layer).values():
            if type(linear) is not nn.Linear or linear.weight.is_meta or not linear.weight.is_floating_point():
                raise PruningError(
                    f"layer {index} has a {type(linear).__name__} ({linear.weight.dtype} on {linear.weight.device}) "
                    "where a plain nn.Linear is needed: load the model unquantised, not offloaded, adapters merged"
                )
        experts = experts_of(family, layer)
        for weight in experts.parameters() if experts else ():
            if weight.is_meta or not weight.is_floating_point():
                raise PruningError(
                    f"layer {index} has weights of experts of type {weight.dtype} on {weight.device}: load the model "
                    "unquantised, not offloaded, adapters merged"
                )
    check_parts(family, model)
    have, head_dim = shapes(model), family.head_dim(model)
    if have != plan.source or head_dim != plan.head_dim:
        raise PruningError(
            f"the plan is for {describe_shapes(plan.source)} (head_dim {plan.head_dim}), "
            f"the model has {describe_shapes(have)} (head_dim {head_dim}): make the plan for this model"
        )


@torch.no_grad()
def shrink_layer_(family: ModelFamily, layer: nn.Module, kept: LayerPlan) -> None:
    """Remove from one layer everything `kept`, which must fit it, does not keep; its config is left as it is."""
    query, kv, channels = _features(kept, family.head_dim_of(layer))
    for linear, rows in _kept_rows(family, layer, query, kv, channels):
        keep_rows_(linear, rows)
    keep_columns_(family.o_proj(layer), query)
    experts = experts_of(family, layer)
    if experts is None:
        keep_columns_(family.down_proj(layer), channels)
    else:
        cut_experts_(experts, kept.kept_by_expert)
    cut_head_norms_(family, layer, kept.kept_query_heads, kept.kept_kv_heads)
    own_heads_(family.attention(layer))
    # what the modules remember of their widths; each family has some of these
    for module, name, value in (
        (family.attention(layer), "num_heads", kept.shape.num_heads),
        (family.attention(layer), "num_key_value_heads", kept.shape.num_kv_heads),
        (family.attention(layer), "num_key_value_groups", kept.shape.num_groups),
        (family.mlp(layer), "intermediate_size", kept.shape.intermediate_size),
    ):
        if hasattr(module, name):
            setattr(module, name, value)
    if not kept.kept_kv_heads:
        without_heads_(family.attention(layer))


def give_output_bias_(family: ModelFamily, layer: nn.Module) -> None:
    """Give the output linears of a layer a bias of zero where they have none."""
    for kind in KINDS:
        linear = output_linear(family, layer, kind)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)


def _mask_layer_(family: ModelFamily, layer: nn.Module, kept: LayerPlan, head_dim: int) -> None:
    query, kv, channels = _features(kept, head_dim)
    for linear, rows in _kept_rows(family, layer, query, kv, channels):
        _zero_(linear, rows=_others(rows, linear.out_features))
    mask_head_norms_(family, layer, kept.kept_query_heads, kept.kept_kv_heads)
    experts = experts_of(family, layer)
    if experts is not None:
        mask_experts_(experts, kept.kept_by_expert)
    outputs = [(family.o_proj(layer), query), *([] if experts else [(family.down_proj(layer), channels)])]
    for linear, columns in outputs:
        linear.weight[:, _others(columns, linear.in_features)] = 0


def kept_inputs(kept: LayerPlan, kind: SubLayerKind, head_dim: int) -> Tensor:
    """Indices of the inputs that a sub-layer's output linear keeps, int64; not of experts."""
    query, _, channels = _features(kept, head_dim)
    return query if kind == "attention" else channels


def _kept_rows(
    family: ModelFamily, layer: nn.Module, query: Tensor, kv: Tensor, channels: Tensor
) -> list[tuple[nn.Linear, Tensor]]:
    """The linears whose rows are heads or channels, with the rows that stay, int64: of each part of a fused one."""
    features = {"q": query, "k": kv, "v": kv, "gate": channels, "up": channels}
    rows: dict[nn.Linear, list[Tensor]] = {}
    for role, projection in family.projections(layer).items():
        if role in features:
            rows.setdefault(projection.linear, []).append(projection.start + features[role])
    return [(linear, torch.cat(parts)) for linear, parts in rows.items()]


def _features(kept: LayerPlan, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Feature indices of the kept query heads, kv heads and channels, int64."""
    return (
        head_features(kept.kept_query_heads, head_dim),
        head_features(kept.kept_kv_heads, head_dim),
        torch.tensor(kept.kept_channels, dtype=torch.int64),
    )


def _others(kept: Tensor, size: int) -> Tensor:
    """The indices below `size` that are not kept."""
    removed = torch.ones(size, dtype=torch.bool)
    removed[kept] = False
    return removed.nonzero().flatten()


def _zero_(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight[rows] = 0
    if linear.bias is not None:
        linear.bias[rows] = 0


def keep_rows_(linear: nn.Linear, rows: Tensor) -> None:
    """Keep these output features of a linear, weight and bias; rows: int64 indices."""
    linear.weight = _take(linear.weight, 0, rows)
    if linear.bias is not None:
        linear.bias = _take(linear.bias, 0, rows)
    linear.out_features = len(rows)


def keep_columns_(linear: nn.Linear, columns: Tensor) -> None:
    """Keep these input features of a linear; columns: int64 indices. The bias stays."""
    linear.weight = _take(linear.weight, 1, columns)
    linear.in_features = len(columns)


def _take(parameter: Tensor, dim: int, indices: Tensor) -> nn.Parameter:
    # index_select copies, so the old storage is freed with the old parameter
    taken = parameter.detach().index_select(dim, indices.to(parameter.device))
    return nn.Parameter(taken, requires_grad=parameter.requires_grad)


def _keep_layers_(layers: nn.ModuleList, kept_layers: tuple[int, ...]) -> None:
    kept = [layers[index] for index in kept_layers]
    del layers[:]
    layers.extend(kept)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                # the KV cache finds a layer's keys by this number
                setattr(module, "layer_idx", index)  # noqa: B010
