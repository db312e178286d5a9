"""Decoder-only models whose layers have different widths, as structured pruning leaves them.

This file is both part of slimline and shipped inside every uneven checkpoint, where `auto_map` in config.json points
to it: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then needs transformers only. It therefore
imports nothing but torch and transformers.

The widths stand in config.json under `per_layer_config`, the standard sparse map {layer: {num_attention_heads,
num_key_value_heads, intermediate_size}} of transformers (under the family's own names: OPT has ffn_dim and no kv
heads, with experts there are num_local_experts and num_experts_per_tok too); the stock classes build all layers equal,
these build each layer from its own entry. Everything else (forward passes, cache, masks, generation) is inherited
unchanged.
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
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4Model,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
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
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    Starcoder2Model,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2DecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2DecoderLayer

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


class _WithHeads:
    """A config but for its number of heads."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self._config, self.num_attention_heads = config, num_attention_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _OwnHeads:
    """An attention with its own number of heads, of a stock one that asks the model's config for it while it runs; goes
    before the stock one."""

    @property
    def config(self: Any) -> Any:
        """The model's config, but for the number of heads."""
        return _WithHeads(self.__dict__["shared_config"], self.num_heads)

    @config.setter
    def config(self: Any, config: Any) -> None:
        self.__dict__["shared_config"] = config


class SlimlinePhi3Attention(_OwnHeads, Phi3Attention):
    """A Phi-3 attention with its own number of heads."""


def own_heads_(attention: Any) -> None:
    """Let an attention that asks the config for its number of heads have its own; others are left as they are."""
    if type(attention) is Phi3Attention:
        config = attention.__dict__.pop("config")
        attention.__class__ = SlimlinePhi3Attention
        attention.config, attention.num_heads = config, config.num_attention_heads


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
    if isinstance(attention, Olmo2Attention):  # its norms span all heads
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight = nn.Parameter(torch.ones(0))
    without_heads_(attention)
    return layer


#: grouped matrix products, transformers' default for experts, want rows of whole 16 bytes: 8 channels in 16 bits
_EXPERT_MULTIPLE = 8

#: of the linears whose output joins the residual stream, in the families that may have none of their biases
_JOINING_NAMES = ("o_proj", "down_proj", "c_proj")


class _UnevenLayers:
    """A decoder that builds each layer from its own config; goes before the stock decoder of the family.

    With output_bias in the config every output linear has a bias, whatever the stock class thinks of it.
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
            if getattr(config, "output_bias", False) and name.endswith(_JOINING_NAMES):
                module.bias = nn.Parameter(torch.zeros(module.out_features))
        for module in self.layers.modules():
            # the layers read the attention implementation at run time: one config for all, so that
            # set_attn_implementation reaches them
            if hasattr(module, "config"):
                module.config = config
            if getattr(module, "intermediate_dim", 0) % _EXPERT_MULTIPLE:
                config._experts_implementation = "eager"
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
class SlimlineGemma2Config(_UnevenConfig, Gemma2Config):
    """A Gemma-2 config; widths may differ between layers."""

    model_type = "slimline-gemma2"


class SlimlineGemma2Model(_UnevenLayers, Gemma2Model):
    """A Gemma-2 decoder of layers with their own widths."""

    config_class = SlimlineGemma2Config
    layer_class = Gemma2DecoderLayer


class SlimlineGemma2ForCausalLM(_UnevenCausalLM, Gemma2ForCausalLM):
    """A Gemma-2 language model of layers with their own widths."""

    config_class = SlimlineGemma2Config
    part_class = SlimlineGemma2Model


@strict
class SlimlineGemma3TextConfig(_UnevenConfig, Gemma3TextConfig):
    """A config of the text part of a Gemma-3; widths may differ between layers."""

    model_type = "slimline-gemma3_text"


class SlimlineGemma3TextModel(_UnevenLayers, Gemma3TextModel):
    """A Gemma-3 decoder of layers with their own widths."""

    config_class = SlimlineGemma3TextConfig
    layer_class = Gemma3DecoderLayer


class SlimlineGemma3ForCausalLM(_UnevenCausalLM, Gemma3ForCausalLM):
    """A Gemma-3 language model of layers with their own widths."""

    config_class = SlimlineGemma3TextConfig
    part_class = SlimlineGemma3TextModel


@strict
class SlimlineGlm4Config(_UnevenConfig, Glm4Config):
    """A GLM-4 config; widths may differ between layers."""

    model_type = "slimline-glm4"


class SlimlineGlm4Model(_UnevenLayers, Glm4Model):
    """A GLM-4 decoder of layers with their own widths."""

    config_class = SlimlineGlm4Config
    layer_class = Glm4DecoderLayer


class SlimlineGlm4ForCausalLM(_UnevenCausalLM, Glm4ForCausalLM):
    """A GLM-4 language model of layers with their own widths."""

    config_class = SlimlineGlm4Config
    part_class = SlimlineGlm4Model


@strict
class SlimlineGraniteConfig(_UnevenConfig, GraniteConfig):
    """A Granite config; widths may differ between layers."""

    model_type = "slimline-granite"


class SlimlineGraniteModel(_UnevenLayers, GraniteModel):
    """A Granite decoder of layers with their own widths."""

    config_class = SlimlineGraniteConfig
    layer_class = GraniteDecoderLayer


class SlimlineGraniteForCausalLM(_UnevenCausalLM, GraniteForCausalLM):
    """A Granite language model of layers with their own widths."""

    config_class = SlimlineGraniteConfig
    part_class = SlimlineGraniteModel


@strict
class SlimlineOlmo2Config(_UnevenConfig, Olmo2Config):
    """An OLMo-2 config; widths may differ between layers."""

    model_type = "slimline-olmo2"


class SlimlineOlmo2Model(_UnevenLayers, Olmo2Model):
    """An OLMo-2 decoder of layers with their own widths."""

    config_class = SlimlineOlmo2Config
    layer_class = Olmo2DecoderLayer


class SlimlineOlmo2ForCausalLM(_UnevenCausalLM, Olmo2ForCausalLM):
    """An OLMo-2 language model of layers with their own widths."""

    config_class = SlimlineOlmo2Config
    part_class = SlimlineOlmo2Model


@strict
class SlimlineSmolLM3Config(_UnevenConfig, SmolLM3Config):
    """A SmolLM3 config; widths may differ between layers."""

    model_type = "slimline-smollm3"


class SlimlineSmolLM3Model(_UnevenLayers, SmolLM3Model):
    """A SmolLM3 decoder of layers with their own widths."""

    config_class = SlimlineSmolLM3Config
    layer_class = SmolLM3DecoderLayer


class SlimlineSmolLM3ForCausalLM(_UnevenCausalLM, SmolLM3ForCausalLM):
    """A SmolLM3 language model of layers with their own widths."""

    config_class = SlimlineSmolLM3Config
    part_class = SlimlineSmolLM3Model


@strict
class SlimlineStarcoder2Config(_UnevenConfig, Starcoder2Config):
    """A StarCoder2 config; widths may differ between layers."""

    model_type = "slimline-starcoder2"


class SlimlineStarcoder2Model(_UnevenLayers, Starcoder2Model):
    """A StarCoder2 decoder of layers with their own widths."""

    config_class = SlimlineStarcoder2Config
    layer_class = Starcoder2DecoderLayer


class SlimlineStarcoder2ForCausalLM(_UnevenCausalLM, Starcoder2ForCausalLM):
    """A StarCoder2 language model of layers with their own widths."""

    config_class = SlimlineStarcoder2Config
    part_class = SlimlineStarcoder2Model


@strict
class SlimlinePhi3Config(_UnevenConfig, Phi3Config):
    """A Phi-3 config; widths may differ between layers."""

    model_type = "slimline-phi3"

    def validate_rope(self: Any) -> None:
        """As of every model; the stock Phi-3 rule wants factors for hidden_size / num_attention_heads features, and a
        pruned model has fewer heads of the same width."""
        PreTrainedConfig.validate_rope(self)


def _phi3_layer(config: Any, index: int) -> nn.Module:
    """The stock layer, with an attention that has its own number of heads."""
    layer: Any = Phi3DecoderLayer(config, index)
    own_heads_(layer.self_attn)
    return layer  # type: ignore[no-any-return]


class SlimlinePhi3Model(_UnevenLayers, Phi3Model):
    """A Phi-3 decoder of layers with their own widths."""

    config_class = SlimlinePhi3Config
    layer_class = staticmethod(_phi3_layer)


class SlimlinePhi3ForCausalLM(_UnevenCausalLM, Phi3ForCausalLM):
    """A Phi-3 language model of layers with their own widths."""

    config_class = SlimlinePhi3Config
    part_class = SlimlinePhi3Model


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


def _one_by_one(model_type: str, stock_type: str) -> None:
    """Checkpoints of a type keep experts as those of the stock type do: one by one, fused when they are loaded."""
    mapping = get_checkpoint_conversion_mapping(stock_type) or get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


@strict
class SlimlineMixtralConfig(_UnevenConfig, MixtralConfig):
    """A Mixtral config; widths and numbers of experts may differ between layers."""

    model_type = "slimline-mixtral"


class SlimlineMixtralModel(_UnevenLayers, MixtralModel):
    """A Mixtral decoder of layers with their own widths."""

    config_class = SlimlineMixtralConfig
    layer_class = MixtralDecoderLayer


class SlimlineMixtralForCausalLM(_UnevenCausalLM, MixtralForCausalLM):
    """A Mixtral language model of layers with their own widths."""

    config_class = SlimlineMixtralConfig
    part_class = SlimlineMixtralModel


@strict
class SlimlineQwen3MoeConfig(_UnevenConfig, Qwen3MoeConfig):
    """A Qwen3-MoE config; widths and numbers of experts may differ between layers."""

    model_type = "slimline-qwen3_moe"


class SlimlineQwen3MoeModel(_UnevenLayers, Qwen3MoeModel):
    """A Qwen3-MoE decoder of layers with their own widths."""

    config_class = SlimlineQwen3MoeConfig
    layer_class = Qwen3MoeDecoderLayer


class SlimlineQwen3MoeForCausalLM(_UnevenCausalLM, Qwen3MoeForCausalLM):
    """A Qwen3-MoE language model of layers with their own widths."""

    config_class = SlimlineQwen3MoeConfig
    part_class = SlimlineQwen3MoeModel


_one_by_one(SlimlineMixtralConfig.model_type, "mixtral")
_one_by_one(SlimlineQwen3MoeConfig.model_type, "qwen3_moe")
