"""The classes a pruned model may have: the stock one of its family, or ours for layers of different widths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pruning.families import ModelFamily, family_of
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


def describe_(model: PreTrainedModel, kept_layers: tuple[int, ...], shapes: tuple[LayerShape, ...]) -> None:
    """Give a model whose layers were cut the config and the class that fit it.

    kept_layers: the layers' indices in the old config; shapes: their widths now. Equal widths get the stock class and
    plain fields; others (and head counts that the stock config refuses) ours and `per_layer_config`.
    """
    family = family_of(model)
    decoder: Any = family.decoder(model)
    values = _config_values(model.config, kept_layers, shapes) | {"head_dim": family.head_dim(model)}
    uneven = "per_layer_config" in values or not _accepts(causal_class(family, uneven=False).config_class, values)
    new_class = causal_class(family, uneven=uneven)
    config = new_class.config_class(**values)
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = model.config._name_or_path
    model.__class__ = new_class
    decoder.__class__ = getattr(_module(uneven), new_class.__name__.removesuffix("ForCausalLM") + "Model")
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
    if hasattr(decoder, "has_sliding_layers"):
        decoder.has_sliding_layers = "sliding_attention" in config.layer_types


def config_shapes(config: Any) -> tuple[LayerShape, ...]:
    """The widths a config promises, one per layer."""
    return tuple(
        LayerShape(
            num_heads=layer.num_attention_heads,
            num_kv_heads=layer.num_key_value_heads,
            intermediate_size=layer.intermediate_size,
        )
        for layer in config.per_layer_config
    )


class _Named:
    """As much of a config as `family_of` reads."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


def _config_values(
    old: PreTrainedConfig, kept_layers: tuple[int, ...], shapes: tuple[LayerShape, ...]
) -> dict[str, Any]:
    values: dict[str, Any] = old.to_dict()
    for name in ("per_layer_config", "auto_map", "architectures", "model_type"):
        values.pop(name, None)
    if values.get("layer_types") is not None:
        values["layer_types"] = [values["layer_types"][index] for index in kept_layers]
    layers = [
        {
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "intermediate_size": shape.intermediate_size,
        }
        for shape in shapes
    ]
    # the plain fields hold the largest widths; per_layer_config keeps only the entries that differ from them
    largest = {name: max(layer[name] for layer in layers) for name in layers[0]}
    overrides = {
        index: {name: value for name, value in layer.items() if value != largest[name]}
        for index, layer in enumerate(layers)
        if layer != largest
    }
    return (
        values | largest | {"num_hidden_layers": len(shapes)} | ({"per_layer_config": overrides} if overrides else {})
    )


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
