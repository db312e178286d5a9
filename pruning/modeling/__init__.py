"""The classes a pruned model may have: the stock one of its family, or ours for layers of different widths.

`modeling_slimline` is copied beside every checkpoint with unequal layers and loaded by transformers' trust_remote_code
where slimline is not installed: it imports torch and transformers alone. Its name is in the config of every such
checkpoint, so it stays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pruning.families import ModelFamily, family_of
from pruning.families.family import EXPERT_MULTIPLE
from pruning.plan import LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def causal_class(family: ModelFamily, *, uneven: bool) -> Any:
    """The causal LM class of a family: stock transformers, or ours that builds each layer from its own config."""
    return getattr(_module(uneven), family.architectures[uneven])


def class_of(model_type: str) -> Any:
    """The causal LM class for a config.json's model_type. Raises PruningError if it is none of ours."""
    family = family_of(_Named(model_type))
    return causal_class(family, uneven=model_type == family.model_types[1])


def pruned_config(
    config: PreTrainedConfig,
    family: ModelFamily,
    head_dim: int,
    kept_layers: tuple[int, ...],
    shapes: tuple[LayerShape, ...],
    *,
    output_bias: bool = False,
) -> tuple[Any, PreTrainedConfig]:
    """The causal LM class and the config of a model after pruning; `config`, the old one, is left as it is.

    head_dim: width of one head. kept_layers: the layers' indices in the old config. shapes: their widths now. Equal
    widths get the stock class and plain fields; others (and head counts that the stock class cannot build) ours and
    `per_layer_config`; so do experts of a width that transformers' default for experts cannot compute. output_bias:
    whether the output linears have got biases, which stock classes do not know either.
    """
    stock = causal_class(family, uneven=False)
    values = _config_values(config, family, kept_layers, shapes)
    if family.experts and family.experts.dense_field:
        values |= _dense_layers(family.experts.dense_field, shapes)
    if output_bias:
        values["output_bias"] = True
    explicit = values | {"head_dim": head_dim}
    # a stock class that divides the hidden size by the heads must not be told a width of its own
    plain = explicit if family.stock_head_dim else values
    whole = family.stock_head_dim or values[family.heads_field] * head_dim == config.hidden_size
    grouped = all(fits_grouped_products(shape.intermediate_size) for shape in shapes if shape.num_experts)
    even = "per_layer_config" not in values and not values.get("output_bias")
    if whole and even and grouped and _accepts(stock.config_class, plain):
        new_class, new_config = stock, stock.config_class(**plain)
    else:
        new_class = causal_class(family, uneven=True)
        new_config = new_class.config_class(**explicit)
        # a tokenizer's loader makes a config of no class of ours of config.json: it may read widths too (longrope)
        new_config.allow_global_per_layer_attribute_access = True
    new_config._attn_implementation = config._attn_implementation
    new_config._experts_implementation = config._experts_implementation if grouped else "eager"
    new_config._name_or_path = config._name_or_path
    return new_class, new_config


def describe_(
    model: PreTrainedModel, kept_layers: tuple[int, ...], shapes: tuple[LayerShape, ...], *, output_bias: bool = False
) -> None:
    """Give a model whose layers were cut the config and the classes that fit it (see `pruned_config`)."""
    family = family_of(model)
    head_dim = family.head_dim(model)
    new_class, config = pruned_config(model.config, family, head_dim, kept_layers, shapes, output_bias=output_bias)
    classes = sys.modules[new_class.__module__]
    prefix = new_class.__name__.removesuffix(family.architectures[0])
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
        if hasattr(module, "has_sliding_layers"):
            module.has_sliding_layers = "sliding_attention" in config.layer_types
    # the language model, the model in it and, of an OPT, the decoder in that
    for path in _prefixes(family.layers_path):
        part = model.get_submodule(path)
        part.__class__ = getattr(classes, prefix + type(part).__name__.removeprefix("Slimline"))


def config_shapes(config: Any) -> tuple[LayerShape, ...]:
    """The widths a config promises, one per layer."""
    family = family_of(config)
    return tuple(_config_shape(family, layer, index) for index, layer in enumerate(config.per_layer_config))


def _config_shape(family: ModelFamily, layer: Any, index: int) -> LayerShape:
    experts = family.experts if family.experts and family.experts.is_sparse(layer, index) else None
    return LayerShape(
        num_heads=getattr(layer, family.heads_field),
        num_kv_heads=getattr(layer, family.kv_heads_field or family.heads_field),
        intermediate_size=getattr(layer, experts.size_field if experts else family.intermediate_field),
        num_experts=getattr(layer, experts.num_experts_field) if experts else 0,
    )


def fits_grouped_products(width: int) -> bool:
    """Whether experts of so many channels can be computed all at once: torch wants rows of whole 16 bytes."""
    return width % EXPERT_MULTIPLE == 0


class _Named:
    """As much of a config as `family_of` reads."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


def _config_values(
    old: PreTrainedConfig, family: ModelFamily, kept_layers: tuple[int, ...], shapes: tuple[LayerShape, ...]
) -> dict[str, Any]:
    """The old config's fields with the new widths, `per_layer_config` if these differ, and without head_dim."""
    values: dict[str, Any] = old.to_dict()
    for name in (
        *("per_layer_config", "allow_global_per_layer_attribute_access"),
        *("auto_map", "architectures", "model_type", "head_dim"),
    ):
        values.pop(name, None)
    for name in family.per_layer_fields:
        if values.get(name) is not None:
            values[name] = [values[name][index] for index in kept_layers]
    was = old.per_layer_config
    layers = [_widths(family, shape, was[index]) for index, shape in zip(kept_layers, shapes, strict=True)]
    # the plain fields hold the largest widths; per_layer_config keeps only the entries that differ from them. A layer
    # with experts has none of an MLP, and the other way round
    largest: dict[str, int] = {}
    for layer in layers:
        largest |= {name: max(value, largest.get(name, 0)) for name, value in layer.items()}
    overrides = {
        index: {name: value for name, value in layer.items() if value != largest[name]}
        for index, layer in enumerate(layers)
        if any(value != largest[name] for name, value in layer.items())
    }
    return (
        values | largest | {"num_hidden_layers": len(shapes)} | ({"per_layer_config": overrides} if overrides else {})
    )


def _widths(family: ModelFamily, shape: LayerShape, was: Any) -> dict[str, int]:
    """A layer's widths under the names of the config; was: its config before. A token goes to no more experts than
    there are."""
    if shape.num_experts:
        assert family.experts is not None
        per_token = min(getattr(was, family.experts.per_token_field), shape.num_experts)
        widths = {
            family.experts.size_field: shape.intermediate_size,
            family.experts.num_experts_field: shape.num_experts,
            family.experts.per_token_field: per_token,
        }
    else:
        widths = {family.intermediate_field: shape.intermediate_size}
    widths[family.heads_field] = shape.num_heads
    return widths if family.kv_heads_field is None else widths | {family.kv_heads_field: shape.num_kv_heads}


def _dense_layers(dense_field: str, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """Which of the layers that are left have an MLP: all others have experts."""
    dense = [index for index, shape in enumerate(shapes) if not shape.num_experts]
    return {dense_field: dense, "decoder_sparse_step": 1}


def _prefixes(layers_path: str) -> list[str]:
    """The paths of the modules that a path leads through: "model.layers" gives "" and "model"."""
    parts = layers_path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def _accepts(config_class: Any, values: dict[str, Any]) -> bool:
    """Stock Llama refuses head counts that do not divide hidden_size, whatever head_dim says."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config_class(**values)
    except StrictDataclassError:
        return False
    return True


def _module(uneven: bool) -> Any:
    if uneven:
        from pruning.modeling import modeling_slimline

        return modeling_slimline
    import transformers

    return transformers
