"""Families: rows fit real models, shapes are read from the weights, costs are exact."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
)

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.errors import PruningError
from pruning.families import FAMILIES as ROWS
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.families.forward import KINDS, input_norm, output_linear, output_norm
from pruning.families.parts import check_parts
from pruning.plan import LayerShape
from tests.tiny import FAMILIES, LATER_FAMILIES, random_ids, random_plan, tiny_model


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


@pytest.mark.parametrize("name", [*FAMILIES, *LATER_FAMILIES])
def test_every_name_of_a_row_exists(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model)
    assert family is family_of(model.config)
    assert family.name == name.removesuffix("-mha")
    check_parts(family, model)
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
    linears = family.linears(layer)
    assert set(linears.values()) == {module for module in layer.modules() if isinstance(module, torch.nn.Linear)}
    distinct = list(dict.fromkeys(linears.values()))
    assert [module for module in calls if module in distinct] == distinct
    # in its order: what stands before a sub-layer, its output linear, what stands behind it
    expected = [
        module
        for kind in KINDS
        for module in (
            input_norm(family, layer, kind),
            output_linear(family, layer, kind),
            output_norm(family, layer, kind),
        )
        if module is not None
    ]
    expected = list(dict.fromkeys(expected))  # parallel sub-layers share a norm
    assert [module for module in calls if module in expected] == expected
    names = {id(module): path.rpartition(".")[2] for path, module in layer.named_modules()}
    assert {role: names[id(linear)] for role, linear in linears.items()} == family.linear_names()
    assert (family.o_proj(layer), family.down_proj(layer)) == (linears["o"], linears["down"])
    shape, head_dim = shapes(model)[1], family.head_dim(model)
    sizes = {"q": shape.num_heads * head_dim, "k": shape.num_kv_heads * head_dim, "up": shape.intermediate_size}
    sizes |= {"v": sizes["k"], "gate": sizes["up"], "o": 32, "down": 32}
    rows = family.projections(layer)
    assert {role: each.num_rows for role, each in rows.items()} == {role: sizes[role] for role in linears}
    for linear in distinct:  # every row has a role
        parts = [each for each in rows.values() if each.linear is linear]
        assert torch.equal(torch.cat([each.weight_OI for each in parts]), linear.weight)
    for norm, role in zip(family.head_norms(layer), "qk", strict=False):
        width = sizes[role] if family.head_norms_span_heads else head_dim
        assert norm.get_parameter("weight").shape == (width,)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_parameters(name: str) -> None:
    model = tiny_model(name)
    kv_heads = 8 if name in ("llama-mha", "phi-mha", "opt") else 4
    assert shapes(model) == (LayerShape(num_heads=8, num_kv_heads=kv_heads, intermediate_size=48),) * 3
    assert decoder_parameters(model) == sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *LATER_FAMILIES])
def test_cost_counts_parameters_without_surgery(name: str, bias: bool) -> None:
    biases = {"llama": ("attention_bias", "mlp_bias"), "gemma": ("attention_bias",), "opt": ("enable_bias",)}
    biases |= dict.fromkeys(("gemma2", "olmo2", "granite", "glm4"), ("attention_bias",)) | {"starcoder2": ("use_bias",)}
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
    """OLMo has norms without weights and clips its queries."""
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "pad_token_id": None}
    relative = OlmoForCausalLM(OlmoConfig(**small, num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(PruningError, match=r"cannot prune OlmoForCausalLM .*Olmo2ForCausalLM \(olmo2\)"):
        family_of(relative)


@pytest.mark.parametrize("part", ["linear", "norm", "parameter", "buffer"])
def test_a_part_that_the_row_does_not_know_is_named(part: str) -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    if part == "parameter":
        attention.extra = torch.nn.Parameter(torch.ones(8))
    elif part == "buffer":
        attention.register_buffer("extra", torch.ones(8))
    else:
        attention.extra = torch.nn.Linear(4, 4) if part == "linear" else torch.nn.RMSNorm(4)
    plan = random_plan(shapes(model), 4)
    for act in (lambda: ResidentDecoder(model), lambda: shrink_(model, plan), lambda: mask_(model, plan)):
        with pytest.raises(PruningError, match=r"model\.layers\.1\.self_attn\.extra.* family llama does not know"):
            act()
    attention.extra = None
    attention.register_buffer("tables", torch.ones(8), persistent=False)  # which no checkpoint holds
    shrink_(model, plan)


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


@pytest.mark.parametrize("family", [*FAMILIES, *LATER_FAMILIES])
def test_the_stock_class_can_be_built_with_the_heads_that_a_family_says(family: str) -> None:
    """Of heads as wide as they are: what `uniform` may leave of them. hidden_size is 32."""
    model = tiny_model(family)
    row, config = family_of(model), model.config
    head_dim, hidden, heads = row.head_dim(model), config.hidden_size, shapes(model)[0].num_heads
    said = row.stock_heads(hidden, head_dim)
    for count in range(1, heads + 1):
        fields = config.to_dict() | {row.heads_field: count, "num_hidden_layers": 1, "layer_types": None}
        fields |= {row.kv_heads_field: 1} if row.kv_heads_field else {}
        fields |= {"head_dim": head_dim} if row.stock_head_dim else {}
        try:
            built = type(model)(type(config)(**fields))
        except (ValueError, StrictDataclassError):
            builds = False
        else:
            layer = row.layers(built)[0]
            builds = row.o_proj(layer).in_features == count * head_dim == count * row.head_dim_of(layer)
        assert builds == (said is None or count in said), (count, said)
