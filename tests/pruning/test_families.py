"""Families: rows fit real models, shapes are read from the weights, costs are exact."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from pruning.errors import PruningError
from pruning.families import FAMILIES as ROWS
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.plan import LayerShape
from pruning.surgery import shrink_
from tests.tiny import FAMILIES, random_plan, tiny_model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_of_a_row_exists(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model)
    assert family is family_of(model.config)
    assert family.name == name.removesuffix("-mha")
    layer = family.layers(model)[1]
    assert layer is model.model.layers[1]
    assert family.decoder(model) is model.model
    assert family.embeddings(model) is model.get_input_embeddings()
    assert family.head(model) is model.get_output_embeddings()
    assert family.final_norm(model) is model.model.norm
    assert family.rotary(model) is model.model.rotary_emb
    assert family.attention_norm(layer) is layer.input_layernorm
    assert family.mlp_norm(layer) is layer.post_attention_layernorm
    linears = (
        family.q_proj(layer),
        family.k_proj(layer),
        family.v_proj(layer),
        family.o_proj(layer),
        family.gate_proj(layer),
        family.up_proj(layer),
        family.down_proj(layer),
    )
    names = {id(module): path.rpartition(".")[2] for path, module in layer.named_modules()}
    assert tuple(names[id(linear)] for linear in linears) == family.linear_names()
    for norm in family.head_norm_names:
        assert family.attention(layer).get_submodule(norm).weight.shape == (family.head_dim(model),)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_parameters(name: str) -> None:
    model = tiny_model(name)
    kv_heads = 8 if name == "llama-mha" else 4
    assert shapes(model) == (LayerShape(num_heads=8, num_kv_heads=kv_heads, intermediate_size=48),) * 3
    assert decoder_parameters(model) == sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_cost_counts_parameters_without_surgery(name: str, bias: bool) -> None:
    biases = {"attention_bias": bias, "mlp_bias": bias} if "llama" in name else {}
    model = tiny_model(name, **biases)
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
