"""Surgery: the shrunk model computes what the masked one does, in every family and for already uneven models."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, OPTForCausalLM, PhiForCausalLM, PreTrainedModel

from pruning.checkpoints.surgery import mask_, shrink_
from pruning.errors import PruningError
from pruning.families import family_of, shapes
from pruning.modeling import config_shapes, pruned_config
from pruning.modeling.modeling_slimline import SlimlineLlamaForCausalLM, SlimlineOPTForCausalLM
from pruning.plan import LayerPlan, PruningPlan
from tests.tiny import FAMILIES, random_ids, random_plan, tiny_model

SLIDING = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}


def plan_for(model: PreTrainedModel, seed: int = 0, drop: int = 1) -> PruningPlan:
    return random_plan(shapes(model), family_of(model).head_dim(model), seed=seed, drop=drop)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(random_ids(model)).logits


def generate(model: PreTrainedModel, **options: object) -> torch.Tensor:
    ids = random_ids(model, length=7)
    return model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_equals_shrunk(name: str, seed: int) -> None:
    dense = tiny_model(name, layers=4)
    plan = plan_for(dense, seed, drop=seed)
    masked, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
    mask_(masked, plan)
    shrink_(shrunk, plan)
    assert shapes(masked) == plan.source
    assert shapes(shrunk) == plan.shapes
    assert (logits(masked) - logits(dense)).abs().max() > 0.01
    torch.testing.assert_close(logits(shrunk), logits(masked), atol=1e-5, rtol=0)


def test_biases_of_every_linear() -> None:
    dense = tiny_model("llama", attention_bias=True, mlp_bias=True)
    plan = plan_for(dense, seed=4)
    masked = copy.deepcopy(dense)
    mask_(masked, plan)
    shrink_(dense, plan)
    torch.testing.assert_close(logits(dense), logits(masked), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_plans_equal_their_composition(name: str) -> None:
    once, twice = tiny_model(name, layers=4), tiny_model(name, layers=4)
    first = plan_for(twice, seed=1)
    shrink_(twice, first)
    then = plan_for(twice, seed=2)
    shrink_(twice, then)
    shrink_(once, first.compose(then))
    assert shapes(once) == shapes(twice) == then.shapes
    for (name_once, a), (name_twice, b) in zip(once.named_parameters(), twice.named_parameters(), strict=True):
        assert name_once == name_twice
        assert torch.equal(a, b)
    assert torch.equal(logits(once), logits(twice))
    assert once.config.to_dict() == twice.config.to_dict()


@pytest.mark.parametrize("drop", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_and_without_cache(name: str, drop: int) -> None:
    model = tiny_model(name, **SLIDING.get(name, {}))
    shrink_(model, plan_for(model, seed=3, drop=drop))
    with_cache = generate(model)
    assert torch.equal(with_cache, generate(model, use_cache=False))
    assert torch.equal(with_cache, generate(model, cache_implementation="static"))


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows_survive_dropped_layers(name: str) -> None:
    dense = tiny_model(name, layers=4, **SLIDING[name])
    full = PruningPlan.full(shapes(dense), family_of(dense).head_dim(dense))
    for kept in ((0, 2), (1, 3), (0,)):
        plan = full.model_copy(update={"layers": tuple(full.layers[index] for index in kept)})
        masked, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
        mask_(masked, plan)
        shrink_(shrunk, plan)
        torch.testing.assert_close(logits(shrunk), logits(masked), atol=1e-5, rtol=0)
        if name != "mistral":
            assert shrunk.config.layer_types == [dense.config.layer_types[index] for index in kept]
            assert shrunk.model.has_sliding_layers == (kept != (0,))


def test_uniform_plans_leave_the_stock_class() -> None:
    model = tiny_model("llama")
    full = PruningPlan.full(shapes(model), 4)
    half = LayerPlan(layer=0, kept_query_heads=(0, 1, 2, 3), kept_kv_heads=(0, 1), kept_channels=tuple(range(16)))
    uneven = full.model_copy(update={"layers": (half, *full.layers[1:])})
    shrink_(model, uneven)
    assert type(model) is SlimlineLlamaForCausalLM
    assert model.config.is_heterogeneous
    assert [layer.num_attention_heads for layer in model.config.per_layer_config] == [4, 8, 8]
    assert model.config.head_dim == 4
    layers = tuple(half.model_copy(update={"layer": index}) for index in range(3))
    rest = PruningPlan(source=shapes(model), head_dim=4, layers=layers)
    shrink_(model, rest)
    assert type(model) is LlamaForCausalLM
    assert type(model.model).__name__ == "LlamaModel"
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 16)
    assert not config.is_heterogeneous
    assert not hasattr(config, "auto_map")
    assert all(module.config is config for module in model.modules() if hasattr(module, "config"))


def test_equal_widths_that_the_stock_config_refuses() -> None:
    """Llama wants hidden_size % num_attention_heads == 0 even if head_dim is given: 32 % 6."""
    model = tiny_model("llama")
    full = PruningPlan.full(shapes(model), 4)
    layers = tuple(
        layer.model_copy(update={"kept_query_heads": tuple(range(6)), "kept_kv_heads": (0, 1, 2)})
        for layer in full.layers
    )
    shrink_(model, PruningPlan(source=full.source, head_dim=4, layers=layers))
    assert type(model) is SlimlineLlamaForCausalLM
    assert not model.config.is_heterogeneous
    assert model.config.num_attention_heads == 6


def equal_layers(model: PreTrainedModel, heads: int, channels: int) -> PruningPlan:
    """A plan that keeps so many query heads, each of a kv head of its own, and channels in every layer."""
    full = PruningPlan.full(shapes(model), family_of(model).head_dim(model))
    kept = {"kept_query_heads": tuple(range(heads)), "kept_kv_heads": tuple(range(heads))}
    layers = tuple(layer.model_copy(update={**kept, "kept_channels": tuple(range(channels))}) for layer in full.layers)
    return PruningPlan(source=full.source, head_dim=full.head_dim, layers=layers)


def test_an_opt_with_fewer_heads_needs_our_class_even_if_its_layers_are_equal() -> None:
    """The stock OPT takes hidden_size / num_attention_heads for the width of a head: it cannot have fewer heads."""
    narrow, fewer = tiny_model("opt"), tiny_model("opt")
    shrink_(narrow, equal_layers(narrow, heads=8, channels=16))
    assert type(narrow) is OPTForCausalLM
    assert [type(part).__name__ for part in (narrow.model, narrow.model.decoder)] == ["OPTModel", "OPTDecoder"]
    assert narrow.config.ffn_dim == 16
    assert not {"head_dim", "num_key_value_heads", "auto_map"} & set(narrow.config.to_dict())
    shrink_(fewer, equal_layers(fewer, heads=4, channels=48))
    assert type(fewer) is SlimlineOPTForCausalLM
    assert not fewer.config.is_heterogeneous
    assert (fewer.config.num_attention_heads, fewer.config.head_dim) == (4, 4)
    rebuilt = SlimlineOPTForCausalLM(fewer.config)
    rebuilt.load_state_dict(fewer.state_dict())
    assert torch.equal(logits(rebuilt.eval()), logits(fewer))


def test_a_phi_with_fewer_heads_stays_a_stock_phi_with_its_rotary_share() -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.4}  # of phi-2; the default is 0.5
    model = tiny_model("phi-mha", hidden=80, rope_parameters=rope)
    shrink_(model, equal_layers(model, heads=3, channels=16))
    assert type(model) is PhiForCausalLM
    assert (model.config.num_attention_heads, model.config.head_dim) == (3, 10)
    assert model.config.rope_parameters == rope
    rebuilt = PhiForCausalLM(model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(logits(rebuilt.eval()), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_can_be_made_without_a_model(name: str) -> None:
    model = tiny_model(name)
    plan, family, old = plan_for(model), family_of(model), model.config.to_dict()
    kept = tuple(layer.layer for layer in plan.layers)
    new_class, config = pruned_config(model.config, family, plan.head_dim, kept, plan.shapes)
    assert model.config.to_dict() == old
    assert config_shapes(config) == plan.shapes
    shrink_(model, plan)
    assert type(model) is new_class
    assert model.config.to_dict() == config.to_dict()
    assert [type(part) for part in new_class(config).modules() if isinstance(part, PreTrainedModel)] == [
        type(part) for part in model.modules() if isinstance(part, PreTrainedModel)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_has_one_owner(name: str) -> None:
    model = tiny_model(name)
    layers = family_of(model).layers(model)
    old = {parameter.data_ptr() for parameter in layers.parameters() if parameter.dim() == 2}
    held = list(model.parameters())  # keeps the old storages alive, so no address is reused
    shrink_(model, plan_for(model, seed=5))
    new = [parameter for parameter in layers.parameters() if parameter.dim() == 2 and parameter.numel()]
    assert not old & {parameter.data_ptr() for parameter in new}
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.numel() * 4 for p in new)
    assert len(held) > len(new)


def test_frozen_weights_stay_frozen_and_mode_stays() -> None:
    model = tiny_model("qwen2").requires_grad_(False).train()
    shrink_(model, plan_for(model))
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_plans_for_another_model_are_refused() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    for operation in (shrink_, mask_):
        with pytest.raises(
            PruningError, match=r"the plan is for 4 layers of 8/4 heads x 48 .*, the model has 3 layers"
        ):
            operation(model, plan_for(tiny_model("llama", layers=4)))
        with pytest.raises(PruningError, match="head_dim 4"):
            operation(model, random_plan(shapes(model), 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_offloaded_weights_are_refused() -> None:
    model = tiny_model("llama")
    plan = plan_for(model)
    with pytest.raises(PruningError, match="a plain"):
        shrink_(model.to("meta"), plan)
