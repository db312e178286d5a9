"""The supported families, one row each. To support a further one, add a row, and its classes in pruning.modeling."""

from __future__ import annotations

from typing import Any

from pruning.families.family import ExpertNames, ModelFamily, Requirement


def _qwen3_moe_is_sparse(config: Any, layer: int) -> bool:
    step = config.decoder_sparse_step
    return layer not in config.mlp_only_layers and config.num_experts > 0 and (layer + 1) % step == 0


FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily(
        name="llama",
        model_types=("llama", "slimline-llama"),
        architectures=("LlamaForCausalLM", "SlimlineLlamaForCausalLM"),
        heads_divide_hidden=True,
        llama_cpp="llama",
        computes_as_llama=True,
    ),
    ModelFamily(
        name="mistral",
        model_types=("mistral", "slimline-mistral"),
        architectures=("MistralForCausalLM", "SlimlineMistralForCausalLM"),
        llama_cpp="llama",
        computes_as_llama=True,
    ),
    ModelFamily(
        name="qwen2",
        model_types=("qwen2", "slimline-qwen2"),
        architectures=("Qwen2ForCausalLM", "SlimlineQwen2ForCausalLM"),
        llama_cpp="qwen2",
        computes_as_llama=True,
    ),
    ModelFamily(
        name="qwen3",
        model_types=("qwen3", "slimline-qwen3"),
        architectures=("Qwen3ForCausalLM", "SlimlineQwen3ForCausalLM"),
        llama_cpp="qwen3",
        head_norm_names=("q_norm", "k_norm"),
    ),
    ModelFamily(
        name="gemma",
        model_types=("gemma", "slimline-gemma"),
        architectures=("GemmaForCausalLM", "SlimlineGemmaForCausalLM"),
        llama_cpp="gemma",
    ),
    ModelFamily(
        name="phi",
        model_types=("phi", "slimline-phi"),
        architectures=("PhiForCausalLM", "SlimlinePhiForCausalLM"),
        final_norm_path="model.final_layernorm",
        o_name="dense",
        gate_name=None,
        up_name="fc1",
        down_name="fc2",
        mlp_norm_name="input_layernorm",
        parallel_residual=True,
        requirements=(
            Requirement(
                lambda config: not getattr(config, "qk_layernorm", False),
                "its config has qk_layernorm, which phi-1, phi-1.5 and phi-2 do not; take one of those",
            ),
        ),
    ),
    ModelFamily(
        name="opt",
        model_types=("opt", "slimline-opt"),
        architectures=("OPTForCausalLM", "SlimlineOPTForCausalLM"),
        layers_path="model.decoder.layers",
        embeddings_path="model.decoder.embed_tokens",
        final_norm_path="model.decoder.final_layer_norm",
        rotary_path=None,
        mlp_name="",
        o_name="out_proj",
        gate_name=None,
        up_name="fc1",
        down_name="fc2",
        activation_name="activation_fn",
        attention_norm_name="self_attn_layer_norm",
        mlp_norm_name="final_layer_norm",
        kv_heads_field=None,
        intermediate_field="ffn_dim",
        stock_head_dim=False,
        requirements=(
            Requirement(
                lambda config: (
                    getattr(config, "do_layer_norm_before", True)
                    and not getattr(config, "_remove_final_layer_norm", False)
                ),
                "its config has do_layer_norm_before = false (as opt-350m) or no final norm, and the norms must stand "
                "before the sub-layers; take another size of OPT",
            ),
            Requirement(
                lambda config: getattr(config, "word_embed_proj_dim", None) == getattr(config, "hidden_size", None),
                "its embeddings are projected (word_embed_proj_dim is not hidden_size, as in opt-350m); take another "
                "size of OPT",
            ),
        ),
    ),
    ModelFamily(
        name="gemma2",
        model_types=("gemma2", "slimline-gemma2"),
        architectures=("Gemma2ForCausalLM", "SlimlineGemma2ForCausalLM"),
        heads_divide_hidden=True,
        mlp_norm_name="pre_feedforward_layernorm",
        attention_output_norm_name="post_attention_layernorm",
        mlp_output_norm_name="post_feedforward_layernorm",
        norm_offset=1.0,
        norm_epsilon_name="eps",
        logits_cap_field="final_logit_softcapping",
    ),
    ModelFamily(
        name="gemma3",
        model_types=("gemma3_text", "slimline-gemma3_text"),
        architectures=("Gemma3ForCausalLM", "SlimlineGemma3ForCausalLM"),
        heads_divide_hidden=True,
        mlp_norm_name="pre_feedforward_layernorm",
        attention_output_norm_name="post_attention_layernorm",
        mlp_output_norm_name="post_feedforward_layernorm",
        norm_offset=1.0,
        norm_epsilon_name="eps",
        logits_cap_field="final_logit_softcapping",
        head_norm_names=("q_norm", "k_norm"),
    ),
    ModelFamily(
        name="phi3",
        model_types=("phi3", "slimline-phi3"),
        architectures=("Phi3ForCausalLM", "SlimlinePhi3ForCausalLM"),
        q_name="qkv_proj",
        k_name="qkv_proj",
        v_name="qkv_proj",
        gate_name="gate_up_proj",
        up_name="gate_up_proj",
    ),
    ModelFamily(
        name="olmo2",
        model_types=("olmo2", "slimline-olmo2"),
        architectures=("Olmo2ForCausalLM", "SlimlineOlmo2ForCausalLM"),
        attention_norm_name=None,
        mlp_norm_name=None,
        attention_output_norm_name="post_attention_layernorm",
        mlp_output_norm_name="post_feedforward_layernorm",
        head_norm_names=("q_norm", "k_norm"),
        head_norms_span_heads=True,
    ),
    ModelFamily(
        name="granite",
        model_types=("granite", "slimline-granite"),
        architectures=("GraniteForCausalLM", "SlimlineGraniteForCausalLM"),
        residual_multiplier_name="residual_multiplier",
        logits_divisor_field="logits_scaling",
    ),
    ModelFamily(
        name="smollm3",
        model_types=("smollm3", "slimline-smollm3"),
        architectures=("SmolLM3ForCausalLM", "SlimlineSmolLM3ForCausalLM"),
        per_layer_fields=("layer_types", "no_rope_layers"),
    ),
    ModelFamily(
        name="glm4",
        model_types=("glm4", "slimline-glm4"),
        architectures=("Glm4ForCausalLM", "SlimlineGlm4ForCausalLM"),
        gate_name="gate_up_proj",
        up_name="gate_up_proj",
        attention_output_norm_name="post_self_attn_layernorm",
        mlp_output_norm_name="post_mlp_layernorm",
    ),
    ModelFamily(
        name="starcoder2",
        model_types=("starcoder2", "slimline-starcoder2"),
        architectures=("Starcoder2ForCausalLM", "SlimlineStarcoder2ForCausalLM"),
        gate_name=None,
        up_name="c_fc",
        down_name="c_proj",
    ),
    ModelFamily(
        name="mixtral",
        model_types=("mixtral", "slimline-mixtral"),
        architectures=("MixtralForCausalLM", "SlimlineMixtralForCausalLM"),
        experts=ExpertNames(
            is_sparse=lambda config, layer: True,
            size_field="intermediate_size",
            published_block="block_sparse_moe",
            published_parts=("w1", "w3", "w2"),
        ),
    ),
    ModelFamily(
        name="qwen3_moe",
        model_types=("qwen3_moe", "slimline-qwen3_moe"),
        architectures=("Qwen3MoeForCausalLM", "SlimlineQwen3MoeForCausalLM"),
        head_norm_names=("q_norm", "k_norm"),
        experts=ExpertNames(
            is_sparse=_qwen3_moe_is_sparse,
            size_field="moe_intermediate_size",
            published_block="mlp",
            published_parts=("gate_proj", "up_proj", "down_proj"),
            dense_field="mlp_only_layers",
        ),
    ),
)
