"""Families: rows fit real models, shapes are read from the weights, costs are exact."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import FAMILIES as ROWS
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.plan import LayerShape
from tests.tiny import FAMILIES, random_ids, random_plan, tiny_model


@torch.no_grad()
def order_of_calls(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules without children, in the order in which the model's own forward runs them."""
    calls: list[torch.nn.Module] = []
    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(lambda module, args, output: calls.append(module)) for leaf in leaves]
    model(random_ids(model))
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_of_a_row_exists(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model)
    assert family is family_of(model.config)
    assert family.name == name.removesuffix("-mha")
    decoder = model.get_decoder()
    layer = family.layers(model)[1]
    assert layer is decoder.layers[1]
    assert family.decoder(model) is decoder
    assert family.embeddings(model) is model.get_input_embeddings()
    assert family.head(model) is model.get_output_embeddings()
    assert family.rotary(model) is getattr(decoder, "rotary_emb", None)
    calls = order_of_calls(model)
    assert calls[-1] is family.head(model)
    assert calls[-2] is family.final_norm(model)
    norms = [family.attention_norm(layer), family.mlp_norm(layer)]
    assert [module for module in calls if module in norms] == norms[: 2 - family.parallel_residual]
    linears = family.linears(layer)
    assert set(linears.values()) == {module for module in layer.modules() if isinstance(module, torch.nn.Linear)}
    assert [module for module in calls if module in linears.values()] == list(linears.values())
    names = {id(module): path.rpartition(".")[2] for path, module in layer.named_modules()}
    assert {role: names[id(linear)] for role, linear in linears.items()} == family.linear_names()
    roles = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = [getattr(family, role)(layer) for role in roles]
    assert [linear for linear in found if linear is not None] == list(linears.values())
    assert family.channel_linears(layer) == tuple(linear for linear in found[4:6] if linear is not None)
    for norm in family.head_norm_names:
        assert family.attention(layer).get_submodule(norm).weight.shape == (family.head_dim(model),)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_parameters(name: str) -> None:
    model = tiny_model(name)
    kv_heads = 8 if name in ("llama-mha", "phi-mha", "opt") else 4
    assert shapes(model) == (LayerShape(num_heads=8, num_kv_heads=kv_heads, intermediate_size=48),) * 3
    assert decoder_parameters(model) == sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_cost_counts_parameters_without_surgery(name: str, bias: bool) -> None:
    biases = {"llama": ("attention_bias", "mlp_bias"), "gemma": ("attention_bias",), "opt": ("enable_bias",)}
    model = tiny_model(name, **dict.fromkeys(biases.get(name.removesuffix("-mha"), ()), bias))
    cost, head_dim = layer_cost(model), family_of(model).head_dim(model)
    for seed in range(3):
        plan = random_plan(shapes(model), head_dim, seed=seed, drop=seed % 2)
        shrink_(model, plan)
        assert decoder_parameters(model) == sum(cost.parameters(shape) for shape in plan.shapes)
        assert layer_cost(model) == cost


def test_unsupported_models_are_named() -> None:
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1))
        classifier = LlamaForSequenceClassification(tiny_model("llama").config)
    with pytest.raises(PruningError, match=r"GPT2LMHeadModel \(model_type 'gpt2'\); supported: LlamaForCausalLM"):
        family_of(gpt2)
    with pytest.raises(PruningError, match="GPT2Config"):
        family_of(gpt2.config)
    with pytest.raises(PruningError, match="LlamaForSequenceClassification"):
        family_of(classifier)
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("named", [["LLaMAForCausalLM"], ["LlamaModel"], [], None])
def test_what_a_config_calls_its_architecture_decides_nothing(named: list[str] | None) -> None:
    config = tiny_model("llama").config
    config.architectures = named
    assert family_of(config).name == "llama"


def test_relatives_with_other_parts_are_not_taken_for_the_family() -> None:
    """Gemma-2 norms what o_proj and down_proj give; Phi-3 fuses q, k, v and gate, up."""
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "pad_token_id": None}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    for relative in (Gemma2ForCausalLM(Gemma2Config(**small, **heads)), Phi3ForCausalLM(Phi3Config(**small, **heads))):
        with pytest.raises(PruningError, match=rf"cannot prune {type(relative).__name__} .*GemmaForCausalLM \(gemma\)"):
            family_of(relative)


@pytest.mark.parametrize(
    "name, config, reason",
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = false .*take another size of OPT"),
        ("opt", {"_remove_final_layer_norm": True}, "no final norm"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is not hidden_size"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ],
)
def test_variants_that_cannot_be_pruned_say_why(name: str, config: dict[str, object], reason: str) -> None:
    model = tiny_model(name, **config)
    for what in (model, model.config):
        with pytest.raises(PruningError, match=rf"cannot prune this (OPT|Phi)ForCausalLM: .*{reason}"):
            family_of(what)
