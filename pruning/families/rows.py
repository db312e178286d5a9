"""The supported families, one row each. To support a further one, add a row, and its classes in pruning.modeling."""

from __future__ import annotations

from pruning.families.family import ModelFamily, Requirement

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
)
