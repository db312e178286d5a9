"""The supported families, one row each. To support a further Llama-shaped model, add a row."""

from __future__ import annotations

from pruning.families.family import ModelFamily

FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily(
        name="llama",
        model_types=("llama", "slimline-llama"),
        architectures=("LlamaForCausalLM", "SlimlineLlamaForCausalLM"),
    ),
    ModelFamily(
        name="mistral",
        model_types=("mistral", "slimline-mistral"),
        architectures=("MistralForCausalLM", "SlimlineMistralForCausalLM"),
    ),
    ModelFamily(
        name="qwen2",
        model_types=("qwen2", "slimline-qwen2"),
        architectures=("Qwen2ForCausalLM", "SlimlineQwen2ForCausalLM"),
    ),
    ModelFamily(
        name="qwen3",
        model_types=("qwen3", "slimline-qwen3"),
        architectures=("Qwen3ForCausalLM", "SlimlineQwen3ForCausalLM"),
        head_norm_names=("q_norm", "k_norm"),
    ),
)
