"""Decoder-only models whose layers have different widths, as structured pruning leaves them.

This file is both part of slimline and shipped inside every uneven checkpoint, where `auto_map` in config.json points
to it: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then needs transformers only. It therefore
imports nothing but torch and transformers.

The widths stand in config.json under `per_layer_config`, the standard sparse map {layer: {num_attention_heads,
num_key_value_heads, intermediate_size}} of transformers; the stock classes build all layers equal, these build each
layer from its own entry. Everything else (forward passes, cache, masks, generation) is inherited unchanged.
"""
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("a model with uneven layers needs transformers >= 5.14: pip install -U transformers")


def _check_groups(config: Any) -> None:
    """Each layer's query heads must share its kv heads equally.

    The stock Llama rule, hidden_size % num_attention_heads == 0, is not needed: head_dim is always explicit.
    """
    for index, layer in enumerate(config.per_layer_config):
        heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        if not kv_heads or heads % kv_heads:
            raise ValueError(f"layer {index}: {heads} query heads cannot share {kv_heads} kv heads equally")


def _build_decoder(model: Any, config: Any, layer_class: Any, norm_class: Any, rotary_class: Any) -> None:
    """What the stock decoders build, but each layer from its own config."""
    model.padding_idx = config.pad_token_id
    model.vocab_size = config.vocab_size
    model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    model.layers = nn.ModuleList(
        layer_class(layer_config, index) for index, layer_config in enumerate(config.per_layer_config)
    )
    for module in model.layers.modules():
        # the layers read the attention implementation at run time: one config for all, so that
        # set_attn_implementation reaches them
        if hasattr(module, "config"):
            module.config = config
    model.norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
    model.rotary_emb = rotary_class(config=config)
    model.gradient_checkpointing = False


def _build_causal_lm(model: Any, config: Any, decoder: nn.Module) -> None:
    model.model = decoder
    model.vocab_size = config.vocab_size
    model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


@strict
class SlimlineLlamaConfig(LlamaConfig):
    """A Llama config; widths may differ between layers."""

    model_type = "slimline-llama"
    _auto_class = "AutoConfig"

    def validate_architecture(self) -> None:
        """Called by transformers when a config is made and saved."""
        _check_groups(self)


class SlimlineLlamaModel(LlamaModel):
    """A Llama decoder of layers with their own widths."""

    config_class = SlimlineLlamaConfig

    def __init__(self, config: SlimlineLlamaConfig) -> None:
        PreTrainedModel.__init__(self, config)
        layer, norm = modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaRMSNorm
        _build_decoder(self, config, layer, norm, modeling_llama.LlamaRotaryEmbedding)
        self.post_init()


class SlimlineLlamaForCausalLM(LlamaForCausalLM):
    """A Llama language model of layers with their own widths."""

    config_class = SlimlineLlamaConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: SlimlineLlamaConfig) -> None:
        PreTrainedModel.__init__(self, config)
        _build_causal_lm(self, config, SlimlineLlamaModel(config))
        self.post_init()


@strict
class SlimlineMistralConfig(MistralConfig):
    """A Mistral config; widths may differ between layers."""

    model_type = "slimline-mistral"
    _auto_class = "AutoConfig"

    def validate_architecture(self) -> None:
        """Called by transformers when a config is made and saved."""
        _check_groups(self)


class SlimlineMistralModel(MistralModel):
    """A Mistral decoder of layers with their own widths."""

    config_class = SlimlineMistralConfig

    def __init__(self, config: SlimlineMistralConfig) -> None:
        PreTrainedModel.__init__(self, config)
        layer, norm = modeling_mistral.MistralDecoderLayer, modeling_mistral.MistralRMSNorm
        _build_decoder(self, config, layer, norm, modeling_mistral.MistralRotaryEmbedding)
        self.post_init()


class SlimlineMistralForCausalLM(MistralForCausalLM):
    """A Mistral language model of layers with their own widths."""

    config_class = SlimlineMistralConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: SlimlineMistralConfig) -> None:
        PreTrainedModel.__init__(self, config)
        _build_causal_lm(self, config, SlimlineMistralModel(config))
        self.post_init()


@strict
class SlimlineQwen2Config(Qwen2Config):
    """A Qwen2 config; widths may differ between layers."""

    model_type = "slimline-qwen2"
    _auto_class = "AutoConfig"

    def validate_architecture(self) -> None:
        """Called by transformers when a config is made and saved."""
        _check_groups(self)


class SlimlineQwen2Model(Qwen2Model):
    """A Qwen2 decoder of layers with their own widths."""

    config_class = SlimlineQwen2Config

    def __init__(self, config: SlimlineQwen2Config) -> None:
        PreTrainedModel.__init__(self, config)
        layer, norm = modeling_qwen2.Qwen2DecoderLayer, modeling_qwen2.Qwen2RMSNorm
        _build_decoder(self, config, layer, norm, modeling_qwen2.Qwen2RotaryEmbedding)
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()


class SlimlineQwen2ForCausalLM(Qwen2ForCausalLM):
    """A Qwen2 language model of layers with their own widths."""

    config_class = SlimlineQwen2Config
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: SlimlineQwen2Config) -> None:
        PreTrainedModel.__init__(self, config)
        _build_causal_lm(self, config, SlimlineQwen2Model(config))
        self.post_init()


@strict
class SlimlineQwen3Config(Qwen3Config):
    """A Qwen3 config; widths may differ between layers."""

    model_type = "slimline-qwen3"
    _auto_class = "AutoConfig"

    def validate_architecture(self) -> None:
        """Called by transformers when a config is made and saved."""
        _check_groups(self)


class SlimlineQwen3Model(Qwen3Model):
    """A Qwen3 decoder of layers with their own widths."""

    config_class = SlimlineQwen3Config

    def __init__(self, config: SlimlineQwen3Config) -> None:
        PreTrainedModel.__init__(self, config)
        layer, norm = modeling_qwen3.Qwen3DecoderLayer, modeling_qwen3.Qwen3RMSNorm
        _build_decoder(self, config, layer, norm, modeling_qwen3.Qwen3RotaryEmbedding)
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()


class SlimlineQwen3ForCausalLM(Qwen3ForCausalLM):
    """A Qwen3 language model of layers with their own widths."""

    config_class = SlimlineQwen3Config
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: SlimlineQwen3Config) -> None:
        PreTrainedModel.__init__(self, config)
        _build_causal_lm(self, config, SlimlineQwen3Model(config))
        self.post_init()
