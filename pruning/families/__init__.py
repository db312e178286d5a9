"""Model families: which row of names fits a model, its per-layer shapes, and what a head or a channel costs.

* `rows`        one row per family: where its parts are called what; a new family is a new row, start here
* `family`      what a row says, asked of a model: layers, linears, norms, head width
* `projection`  the rows of a linear that are q, k, v, gate or up, of its own or of a fused one
* `forward`     one sub-layer computed alone, as the walk does it, and how its output joins the residual stream
* `head_norms`  norms that span all heads of an attention, and lose some with them
* `experts`     mixtures of experts: their linears, which tokens reach them, their router
* `parts`       that a layer has no part which its family's row does not know
* `sites`       where something can be removed, and which columns go together

May import pruning.plan and pruning.errors. What it asks of a model are names and shapes: no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pruning.errors import PruningError
from pruning.families.family import ModelFamily
from pruning.families.rows import FAMILIES
from pruning.plan import LayerShape

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FAMILIES",
    "LayerCost",
    "ModelFamily",
    "decoder_parameters",
    "family_named",
    "family_of",
    "layer_cost",
    "shapes",
]


@dataclass(frozen=True)
class LayerCost:
    """Parameters of one decoder layer as a linear function of its widths; equal for all layers of a model.

    per_query_head: rows of q, columns of o, bias of q. per_kv_head: rows and biases of k and v. Both: their share of a
    norm that spans all heads. per_channel: rows of up (and of gate, if there is one), column of down, biases of up and
    gate; of a layer with experts, of one of them. per_expert: the router's row. fixed: the other norms, biases of o and
    down. stock_heads: numbers of query heads that the stock class can be built with, None: any.
    """

    per_query_head: int
    per_kv_head: int
    per_channel: int
    fixed: int
    stock_heads: tuple[int, ...] | None = None
    per_expert: int = 0

    def channel_parameters(self, shape: LayerShape) -> int:
        """What goes with one channel of a layer's MLP, or with one of each of its experts."""
        return self.per_channel * max(1, shape.num_experts)

    def builds(self, num_heads: int) -> bool:
        """Whether the stock class can be built with so many query heads."""
        return self.stock_heads is None or num_heads in self.stock_heads

    def parameters(self, shape: LayerShape) -> int:
        """Parameters of a layer of `shape`."""
        return (
            self.fixed
            + self.per_query_head * shape.num_heads
            + self.per_kv_head * shape.num_kv_heads
            + self.per_channel * shape.num_channels
            + self.per_expert * shape.num_experts
        )


def family_of(model_or_config: Any) -> ModelFamily:
    """The row for a model or for a config, of which model_type decides: it is computed as transformers' own class of
    that type, whatever it names in `architectures` (old checkpoints "LLaMAForCausalLM", base models "LlamaModel").

    Raises PruningError for an unsupported model, naming it and the supported ones, and for one of a supported family
    whose config asks for what cannot be pruned (opt-350m).
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None)
    architectures = [] if config is model_or_config else [type(model_or_config).__name__]
    for family in FAMILIES:
        if model_type in family.model_types and all(name in family.architectures for name in architectures):
            _check_requirements(family, config)
            return family
    what = ", ".join(architectures) or type(model_or_config).__name__
    supported = ", ".join(f"{family.architectures[0]} ({family.name})" for family in FAMILIES)
    raise PruningError(f"cannot prune {what} (model_type {model_type!r}); supported: {supported}")


def family_named(model_type: str) -> ModelFamily:
    """The row for a config's model_type, which must be one of a row's: nothing else of a config is looked at."""
    return next(family for family in FAMILIES if model_type in family.model_types)


def shapes(model: nn.Module) -> tuple[LayerShape, ...]:
    """Widths of all decoder layers, read from the linears themselves (not from the config)."""
    family = family_of(model)
    head_dim = family.head_dim(model)
    return tuple(_shape(family, layer, head_dim) for layer in family.layers(model))


def decoder_parameters(model: nn.Module) -> int:
    """Parameters of all decoder layers: what sparsity is a share of. Embeddings, final norm and head do not count."""
    return sum(parameter.numel() for parameter in family_of(model).layers(model).parameters())


def layer_cost(model: nn.Module) -> LayerCost:
    """What one query head, kv head and channel cost, so that schedules count parameters without surgery."""
    family = family_of(model)
    layer, shape, head_dim = family.layers(model)[0], shapes(model)[0], family.head_dim(model)
    per_row = {role: projection.parameters_per_row for role, projection in family.projections(layer).items()}
    in_norm = int(family.head_norms_span_heads)
    cost = LayerCost(
        per_query_head=head_dim * (per_row["q"] + family.o_proj(layer).out_features + in_norm),
        per_kv_head=head_dim * (per_row["k"] + per_row["v"] + in_norm),
        per_channel=_per_channel(family, layer, per_row),
        fixed=0,
        per_expert=family.o_proj(layer).out_features if family.experts else 0,
    )
    numel = sum(parameter.numel() for parameter in layer.parameters())
    stock_heads = family.stock_heads(family.o_proj(layer).out_features, head_dim)
    return replace(cost, fixed=numel - cost.parameters(shape), stock_heads=stock_heads)


def _per_channel(family: ModelFamily, layer: nn.Module, per_row: Mapping[str, int]) -> int:
    if family.has_experts(layer):
        return 3 * family.o_proj(layer).out_features
    return per_row.get("gate", 0) + per_row["up"] + family.down_proj(layer).out_features


def _shape(family: ModelFamily, layer: nn.Module, head_dim: int) -> LayerShape:
    from pruning.families.experts import experts_of  # torch is not needed to plan

    rows = {role: projection.num_rows for role, projection in family.projections(layer).items()}
    experts = experts_of(family, layer)
    return LayerShape(
        num_heads=rows["q"] // head_dim,
        num_kv_heads=rows["k"] // head_dim,
        intermediate_size=experts.size if experts else family.down_proj(layer).in_features,
        num_experts=experts.num_experts if experts else 0,
    )


def _check_requirements(family: ModelFamily, config: Any) -> None:
    for requirement in family.requirements:
        if not requirement.holds(config):
            raise PruningError(f"cannot prune this {family.architectures[0]}: {requirement.reason}")
