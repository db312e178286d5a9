"""Decoder-only models whose layers have different widths, as structured pruning leaves them.

This file is both part of slimline and shipped inside every uneven checkpoint, where `auto_map` in config.json points
to it: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then needs transformers only. It therefore
imports nothing but torch and transformers.

The widths stand in config.json under `per_layer_config`, the standard sparse map {layer: {num_attention_heads,
num_key_value_heads, intermediate_size}} of transformers (under the family's own names: OPT has ffn_dim and no kv
heads); the stock classes build all layers equal, these build each layer from its own entry. Everything else (forward
passes, cache, masks, generation) is inherited unchanged.
"""
# mypy: disable-error-code="misc"

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    PhiConfig,
    PhiForCausalLM,
    PhiModel,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("a model with uneven layers needs transformers >= 5.14: pip install -U transformers")


class _UnevenConfig:
    """A config whose widths may differ between layers; goes before the stock config of the family.

    Read from the config as a whole, a width is the largest of any layer. Stock code asks so where only the width of a
    head matters, which is the same in all layers and always explicit: the rotary tables of yarn, dynamic and longrope.
    """

    _auto_class = "AutoConfig"

    def __getattribute__(self: Any, key: str) -> Any:
        overrides = super().__getattribute__("__dict__").get("_heterogeneity_spec")
        if overrides is not None and key in overrides.per_layer_attributes:
            return self._getattr_without_heterogeneous_validation(key)
        return super().__getattribute__(key)

    def validate_architecture(self: Any) -> None:
        """Each layer's query heads must share its kv heads equally; called when a config is made and saved.

        The stock Llama rule, hidden_size % num_attention_heads == 0, is not needed: head_dim is always explicit.
        """
        for index, layer in enumerate(self.per_layer_config):
            heads = layer.num_attention_heads
            kv_heads = getattr(layer, "num_key_value_heads", heads)
            if heads == kv_heads == 0:
                if index == 0:
                    raise ValueError("layer 0 has no attention heads: the length of a KV cache is read from it")
            elif not kv_heads or not heads or heads % kv_heads:
                raise ValueError(f"layer {index}: {heads} query heads cannot share {kv_heads} kv heads equally")


@contextmanager
def _no_layers(config: Any) -> Iterator[None]:
    """The config as one of a model without layers, so that a stock class builds all the rest of itself."""
    num_layers = config.num_hidden_layers
    overrides = config.__dict__.pop("_heterogeneity_spec", None)
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_layers
        if overrides is not None:
            config._heterogeneity_spec = overrides


class _WithoutHeads:
    """An attention without heads: it adds nothing but its bias and caches nothing; goes before the stock one."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """What the output linear makes of no inputs at all."""
        output = next(getattr(self, name) for name in _OUTPUT_NAMES if hasattr(self, name))
        return output(hidden_states.new_zeros(*hidden_states.shape[:-1], 0)), None


_OUTPUT_NAMES = ("o_proj", "out_proj", "dense")


@cache
def _class_without_heads(attention_class: type) -> type:
    return type(f"{attention_class.__name__}WithoutHeads", (_WithoutHeads, attention_class), {})


def without_heads_(attention: Any) -> None:
    """Let an attention whose linears have lost all heads be computed as one that has none."""
    if not isinstance(attention, _WithoutHeads):
        attention.__class__ = _class_without_heads(type(attention))  # type: ignore[arg-type]


def _build_layer(build: Callable[[Any, int], nn.Module], config: Any, index: int) -> nn.Module:
    """A layer of its own config. Stock attentions divide by the number of heads: one is built and taken out again."""
    if config.num_attention_heads:
        return build(config, index)
    one = copy.copy(config)
    for name in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(one, name):
            setattr(one, name, 1)
    layer = build(one, index)
    attention: Any = layer.self_attn
    for name, linear in list(attention.named_children()):
        if isinstance(linear, nn.Linear):
            output = name in _OUTPUT_NAMES
            sizes = (0, linear.out_features) if output else (linear.in_features, 0)
            setattr(attention, name, nn.Linear(*sizes, bias=linear.bias is not None))
    without_heads_(attention)
    return layer


class _UnevenLayers:
    """A decoder that builds each layer from its own config; goes before the stock decoder of the family.

    With output_bias in the config every o_proj and down_proj has a bias, whatever the stock class thinks of it.
    """

    layer_class: Callable[[Any, int], nn.Module]

    def __init__(self: Any, config: Any) -> None:
        with _no_layers(config):
            super().__init__(config)  # type: ignore[call-arg]
        build = type(self).layer_class
        self.layers = nn.ModuleList(
            _build_layer(build, layer_config, i) for i, layer_config in enumerate(config.per_layer_config)
        )
        for name, module in self.layers.named_modules():
            if getattr(config, "output_bias", False) and name.endswith(("o_proj", "down_proj")):
                module.bias = nn.Parameter(torch.zeros(module.out_features))
        for module in self.layers.modules():
            # the layers read the attention implementation at run time: one config for all, so that
            # set_attn_implementation reaches them
            if hasattr(module, "config"):
                module.config = config
        self.post_init()


class _AroundUneven:
    """A stock class around one of ours, which it keeps as `part_name`."""

    part_name = "model"
    part_class: Callable[[Any], nn.Module]

    def __init__(self: Any, config: Any) -> None:
        with _no_layers(config):
            super().__init__(config)  # type: ignore[call-arg]
        setattr(self, self.part_name, type(self).part_class(config))
        self.post_init()


class _UnevenCausalLM(_AroundUneven):
    """A language model of layers with their own widths; goes before the stock one of the family."""

    _auto_class = "AutoModelForCausalLM"


@strict
class SlimlineLlamaConfig(_UnevenConfig, LlamaConfig):
    """A Llama config; widths may differ between layers."""

    model_type = "slimline-llama"


class SlimlineLlamaModel(_UnevenLayers, LlamaModel):
    """A Llama decoder of layers with their own widths."""

    config_class = SlimlineLlamaConfig
    layer_class = LlamaDecoderLayer


class SlimlineLlamaForCausalLM(_UnevenCausalLM, LlamaForCausalLM):
    """A Llama language model of layers with their own widths."""

    config_class = SlimlineLlamaConfig
    part_class = SlimlineLlamaModel


@strict
class SlimlineMistralConfig(_UnevenConfig, MistralConfig):
    """A Mistral config; widths may differ between layers."""

    model_type = "slimline-mistral"


class SlimlineMistralModel(_UnevenLayers, MistralModel):
    """A Mistral decoder of layers with their own widths."""

    config_class = SlimlineMistralConfig
    layer_class = MistralDecoderLayer


class SlimlineMistralForCausalLM(_UnevenCausalLM, MistralForCausalLM):
    """A Mistral language model of layers with their own widths."""

    config_class = SlimlineMistralConfig
    part_class = SlimlineMistralModel


@strict
class SlimlineQwen2Config(_UnevenConfig, Qwen2Config):
    """A Qwen2 config; widths may differ between layers."""

    model_type = "slimline-qwen2"


class SlimlineQwen2Model(_UnevenLayers, Qwen2Model):
    """A Qwen2 decoder of layers with their own widths."""

    config_class = SlimlineQwen2Config
    layer_class = Qwen2DecoderLayer


class SlimlineQwen2ForCausalLM(_UnevenCausalLM, Qwen2ForCausalLM):
    """A Qwen2 language model of layers with their own widths."""

    config_class = SlimlineQwen2Config
    part_class = SlimlineQwen2Model


@strict
class SlimlineQwen3Config(_UnevenConfig, Qwen3Config):
    """A Qwen3 config; widths may differ between layers."""

    model_type = "slimline-qwen3"


class SlimlineQwen3Model(_UnevenLayers, Qwen3Model):
    """A Qwen3 decoder of layers with their own widths."""

    config_class = SlimlineQwen3Config
    layer_class = Qwen3DecoderLayer


class SlimlineQwen3ForCausalLM(_UnevenCausalLM, Qwen3ForCausalLM):
    """A Qwen3 language model of layers with their own widths."""

    config_class = SlimlineQwen3Config
    part_class = SlimlineQwen3Model


@strict
class SlimlineGemmaConfig(_UnevenConfig, GemmaConfig):
    """A Gemma config; widths may differ between layers."""

    model_type = "slimline-gemma"


class SlimlineGemmaModel(_UnevenLayers, GemmaModel):
    """A Gemma decoder of layers with their own widths."""

    config_class = SlimlineGemmaConfig
    layer_class = GemmaDecoderLayer


class SlimlineGemmaForCausalLM(_UnevenCausalLM, GemmaForCausalLM):
    """A Gemma language model of layers with their own widths."""

    config_class = SlimlineGemmaConfig
    part_class = SlimlineGemmaModel


@strict
class SlimlinePhiConfig(_UnevenConfig, PhiConfig):
    """A Phi config; widths may differ between layers."""

    model_type = "slimline-phi"


class SlimlinePhiModel(_UnevenLayers, PhiModel):
    """A Phi decoder of layers with their own widths."""

    config_class = SlimlinePhiConfig
    layer_class = PhiDecoderLayer


class SlimlinePhiForCausalLM(_UnevenCausalLM, PhiForCausalLM):
    """A Phi language model of layers with their own widths."""

    config_class = SlimlinePhiConfig
    part_class = SlimlinePhiModel


@strict
class SlimlineOPTConfig(_UnevenConfig, OPTConfig):
    """An OPT config; widths may differ between layers. head_dim: width of a head, which pruning leaves as it was."""

    model_type = "slimline-opt"
    head_dim: int = 64


def _opt_layer(config: Any, index: int) -> nn.Module:
    """The stock OPT layer takes num_heads * head_dim for the hidden size: its attention is built anew."""
    heads, head_dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    unpruned = copy.copy(config)
    unpruned.num_attention_heads = hidden // head_dim
    layer: nn.Module = OPTDecoderLayer(unpruned, index)
    attention: Any = layer.self_attn
    attention.num_heads = heads
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(hidden, heads * head_dim, bias=config.enable_bias))
    attention.out_proj = nn.Linear(heads * head_dim, hidden, bias=config.enable_bias)
    return layer


class SlimlineOPTDecoder(_UnevenLayers, OPTDecoder):
    """An OPT decoder of layers with their own widths."""

    config_class = SlimlineOPTConfig
    layer_class = staticmethod(_opt_layer)


class SlimlineOPTModel(_AroundUneven, OPTModel):
    """An OPT model of layers with their own widths."""

    config_class = SlimlineOPTConfig
    part_name = "decoder"
    part_class = SlimlineOPTDecoder


class SlimlineOPTForCausalLM(_UnevenCausalLM, OPTForCausalLM):
    """An OPT language model of layers with their own widths."""

    config_class = SlimlineOPTConfig
    part_class = SlimlineOPTModel
