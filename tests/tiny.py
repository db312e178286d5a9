"""Tiny random models and a real tokenizer for unit tests: nothing is downloaded, every weight carries noise."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from pruning.plan import LayerPlan, LayerShape, PruningPlan

FAMILIES = ("llama", "llama-mha", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi-mha", "opt")
"""Names for `tiny_model`; "-mha" is the family with as many kv heads as query heads, which OPT always has."""

LATER_FAMILIES = ("gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3", "glm4", "starcoder2")
"""Families with parts that those above do not have: norms behind outputs, fused linears, multipliers, ..."""

EXPERT_FAMILIES = ("mixtral", "qwen3_moe")
"""Families with experts in the place of the MLP; the second layer of the tiny qwen3_moe has an MLP."""

VOCAB_SIZE = 320
BOS, EOS = 0, 1
_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "phi": PhiConfig,
    "opt": OPTConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
    "olmo2": Olmo2Config,
    "granite": GraniteConfig,
    "smollm3": SmolLM3Config,
    "glm4": Glm4Config,
    "starcoder2": Starcoder2Config,
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
#: what distinguishes a family, small enough to show in a dozen tokens
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0},
    "gemma3": {"sliding_window": 5, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2},
    "granite": {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3, "logits_scaling": 1.5,
    },
    "smollm3": {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2},
    "phi3": {"sliding_window": 7},
    "glm4": {"eos_token_id": [EOS]},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "qwen3_moe": {
        "num_experts": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}  # fmt: skip
#: families whose tiny model has heads wider than hidden/heads
_WIDE_HEADS = ("qwen3", "gemma", "gemma2", "gemma3", "qwen3_moe")


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int | None = None,
    intermediate: int = 48,
    **config: Any,
) -> PreTrainedModel:
    """A random float32 model in eval mode; head_dim is hidden/heads, but twice that for qwen3 and all gemmas.

    config: more fields of the model's config. qwen2 has biases on q/k/v, phi and opt on all linears; qwen3 has q/k
    norms. OPT and Phi, whose configs have no head_dim, take hidden/heads, and an OPT as many kv heads as query heads.
    """
    name, _, variant = family.partition("-")
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if name == "opt":
        values |= {"ffn_dim": intermediate}
    else:
        values |= {
            "intermediate_size": intermediate,
            "num_key_value_heads": heads if variant == "mha" else kv_heads,
        }
    if name not in ("opt", "phi"):
        values["head_dim"] = head_dim or hidden // heads * (2 if name in _WIDE_HEADS else 1)
    model = AutoModelForCausalLM.from_config(_CONFIGS[name](**(values | _OWN.get(name, {}) | config)))
    add_noise_(model, seed)
    return model.eval()


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope_model(family: str, rope_type: str, **config: Any) -> PreTrainedModel:
    """A tiny model of a family with rotary positions, whose context of 16 a type of them stretches (from 8, if any)."""
    head_dim = 16 if family in _WIDE_HEADS else 8
    half = head_dim // 4 if family.startswith("phi") else head_dim // 2  # a Phi turns half of each head
    own: dict[str, dict[str, Any]] = {
        "yarn": {"original_max_position_embeddings": 8},
        "longrope": {
            "short_factor": [1 + 0.1 * index for index in range(half)],
            "long_factor": [2.0 + index for index in range(half)],
            "original_max_position_embeddings": 8,
        },
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    }
    rope = {"rope_type": rope_type, "rope_theta": 1e4} | own.get(rope_type, {})
    rope |= {} if rope_type == "default" else {"factor": 2.0}
    rope |= {"partial_rotary_factor": 0.5} if family.startswith("phi") else {}
    return tiny_model(family, hidden=64, rope_parameters=rope, max_position_embeddings=16, **config)


@torch.no_grad()
def add_noise_(model: torch.nn.Module, seed: int) -> None:
    """Random weights, norms and biases, so that no error can hide behind a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + 0.2 * noise)


def random_ids(model: PreTrainedModel, batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Token ids, shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, int(model.config.vocab_size), (batch, length), generator=generator)


def random_plan(source: Sequence[LayerShape], head_dim: int, *, seed: int = 0, drop: int = 1) -> PruningPlan:
    """A valid plan that drops `drop` layers and keeps differing kv heads, query heads and channels in the others."""
    rng = random.Random(seed)
    kept = sorted(rng.sample(range(len(source)), len(source) - drop))
    return PruningPlan(
        source=tuple(source),
        head_dim=head_dim,
        layers=tuple(_random_layer(rng, index, source[index]) for index in kept),
    )


def _random_layer(rng: random.Random, index: int, shape: LayerShape) -> LayerPlan:
    kv_heads = sorted(rng.sample(range(shape.num_kv_heads), rng.randint(1, shape.num_kv_heads)))
    per_kv_head = rng.randint(1, shape.num_groups)
    group = range(shape.num_groups)
    if shape.num_experts:
        experts = rng.sample(range(shape.num_experts), rng.randint(1, shape.num_experts))
        size, count = shape.intermediate_size, rng.randint(1, shape.intermediate_size)
        channels = [expert * size + channel for expert in experts for channel in rng.sample(range(size), count)]
    else:
        channels = rng.sample(range(shape.intermediate_size), rng.randint(0, shape.intermediate_size))
    return LayerPlan(
        layer=index,
        kept_query_heads=tuple(
            head * shape.num_groups + member for head in kv_heads for member in sorted(rng.sample(group, per_kv_head))
        ),
        kept_kv_heads=tuple(kv_heads),
        kept_channels=tuple(sorted(channels)),
        expert_size=shape.intermediate_size if shape.num_experts else 0,
    )


_TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "Below is an instruction that describes a task. Write a response that answers the question.",
    "What is the capital of France? The capital of France is Paris.",
    "Pruning removes the heads and the channels that matter least, and the others learn to do their work.",
)


@lru_cache(maxsize=1)
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return str(tokenizer.to_str())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> = 0 and </s> = 1, no pad token (as with Llama); encoding begins with <s>."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def sentencepiece_tokenizer(texts: Sequence[str] = _TEXT) -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are letters, one goes before every text, and what has no token is bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*texts] * 3, trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = vocab | {byte: len(vocab) + index for index, byte in enumerate(bytes_)}
    start = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    made = Tokenizer.from_str(json.dumps(content))
    made.post_processor = start
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
