"""Families with norms behind outputs, fused linears, multipliers, per-layer lists: one contract for all of them."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.protocol import WindowProtocol
from infra import registry
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of, shapes
from pruning.layerwise.stand_ins import fit_stand_ins
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import flap, llm_pruner, magnitude, shortened, slimgpt, wanda_sp
from pruning.obs.elimination import eliminate_groups, group_scores
from pruning.plan import PruningPlan
from pruning.recovery import RecoveryInputs, lora
from pruning.statistics.hessian import HessianAccumulator
from pruning.statistics.moments import MomentsAccumulator
from pruning.training.adapters import merged_adapters
from pruning.training.options import TrainingRun
from pruning.walk.state import Pruned
from tests.pruning.captured import (
    CPU,
    ON_THREE_LAYERS,
    RECORDS,
    logits,
    outputs,
    prepared,
    prune_copy,
    recorded_inputs,
    same_weights,
    windows,
)
from tests.pruning.checkpoints.test_surgery import generate, plan_for
from tests.tiny import LATER_FAMILIES, random_ids, tiny_model, tiny_tokenizer

#: one with a norm behind its outputs, one with fused linears, one with norms over all heads
REPRESENTATIVES = ("gemma3", "phi3", "olmo2")
NORMED = ("gemma2", "gemma3", "olmo2", "glm4")
CONFIG = slimgpt.Config(sparsity=0.35, split="equal", curve="linear_increase")


@dataclass(frozen=True)
class Outcome:
    """A model pruned by SlimGPT, masked and cut."""

    dense: PreTrainedModel
    masked: PreTrainedModel
    shrunk: PreTrainedModel
    pruned: Pruned


@cache
def outcome(name: str) -> Outcome:
    dense = tiny_model(name)
    masked, pruned = prune_copy(dense, CONFIG)
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    return Outcome(dense, masked, shrunk, pruned)


def probe(model: PreTrainedModel) -> Tensor:
    return logits(model, random_ids(model, 2, 14, seed=3))


@pytest.mark.parametrize("drop", [0, 1])
@pytest.mark.parametrize("name", LATER_FAMILIES)
def test_masked_is_shrunk_is_saved_and_loaded(name: str, drop: int, tmp_path: Path) -> None:
    dense = tiny_model(name, layers=4)
    plan = plan_for(dense, seed=drop, drop=drop)
    masked, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
    mask_(masked, plan)
    shrink_(shrunk, plan)
    assert (probe(masked) - probe(dense)).abs().max() > 0.01
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=0)
    mask_(masked, plan)  # once more changes nothing
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=0)
    save_checkpoint(shrunk, None, tmp_path, plan)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(probe(loaded), probe(shrunk))
    with_cache = generate(loaded)
    assert torch.equal(with_cache, generate(shrunk, use_cache=False))
    assert torch.equal(with_cache, generate(loaded, cache_implementation="static"))


@pytest.mark.parametrize("name", LATER_FAMILIES)
def test_streamed_is_resident(name: str, tmp_path: Path) -> None:
    found = outcome(name)
    torch.testing.assert_close(probe(found.shrunk), probe(found.masked), atol=1e-5, rtol=1e-5)
    save_checkpoint(found.dense, None, tmp_path / "source")
    pruned = prune_checkpoint(
        tmp_path / "source",
        tmp_path / "out",
        slimgpt,
        windows(found.dense),
        CONFIG,
        options=CPU,
        work=tmp_path / "work",
    )
    assert pruned.plan == found.pruned.plan
    loaded = load_checkpoint(tmp_path / "out")
    assert type(loaded) is type(found.shrunk)
    assert same_weights(loaded, found.shrunk)
    # a pruned model is a model: it can be pruned again
    again, then = prune_copy(loaded, slimgpt.Config(sparsity=0.2, split="ffn"))
    shrink_(again, then.plan)
    whole = copy.deepcopy(found.dense)
    shrink_(whole, found.pruned.plan.compose(then.plan))
    assert shapes(again) == shapes(whole)


@pytest.mark.parametrize("name", LATER_FAMILIES)
def test_fewer_layers_are_a_stock_model(name: str, tmp_path: Path) -> None:
    dense = tiny_model(name, layers=4)
    full = PruningPlan.full(shapes(dense), family_of(dense).head_dim(dense))
    for kept in ((0, 2), (1, 2, 3)):
        plan = full.model_copy(update={"layers": tuple(full.layers[index] for index in kept)})
        masked, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
        mask_(masked, plan)
        shrink_(shrunk, plan)
        assert type(shrunk) is type(dense)
        torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=0)
        for field in family_of(dense).per_layer_fields:
            whole = getattr(dense.config, field, None)
            assert getattr(shrunk.config, field, None) == (whole and [whole[index] for index in kept])
        save_checkpoint(shrunk, None, tmp_path / str(len(kept)))
        config = json.loads((tmp_path / str(len(kept)) / "config.json").read_bytes())
        assert config["architectures"] == [type(dense).__name__]
        assert "auto_map" not in config
        assert torch.equal(probe(load_checkpoint(tmp_path / str(len(kept)))), probe(shrunk))


@pytest.mark.parametrize("name", LATER_FAMILIES)
def test_training_and_measuring_what_was_pruned(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(outcome(name).shrunk)
    before = copy.deepcopy(model.state_dict())
    config = lora.Config(batch_size=2, micro_batch_size=2, max_steps=1, learning_rate=1e-2, warmup_steps=0)
    report = lora.recover(model, tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, TrainingRun(tmp_path))
    assert report.num_steps == 1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    family = family_of(model)
    linears = {id(linear.weight) for layer in family.layers(model) for linear in family.linears(layer).values()}
    adapted = {name for name, value in model.named_parameters() if id(value) in linears and value.numel()}
    assert changed == adapted
    assert type(model) is type(outcome(name).shrunk)
    texts = ["The quick brown fox jumps over the lazy dog."] * 3
    measured = perplexity(model, tiny_tokenizer(), texts, WindowProtocol(window=16), EvalOptions(batch_size=2))
    assert 1 < measured.ppl < 1e4


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize(
    "method", sorted(set(registry.available("pruning.methods")) - {"slimgpt", "experts", "vocabulary"})
)
def test_every_method(method: str, name: str, tmp_path: Path) -> None:
    dense, module = tiny_model(name), registry.load("pruning.methods", method, "method")
    options = ON_THREE_LAYERS.get(method, {})
    if hasattr(module, "train") and name == "olmo2":
        with pytest.raises(PruningError, match=r"one norm spans the queries of all heads.*: set split to ffn"):
            prune_copy(dense, module.Config(sparsity=0.3, **options), method=module)
        options = {**options, "split": "ffn"}
    masked, pruned = prune_copy(dense, module.Config(sparsity=0.3, **options), method=module)
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=1e-5)
    assert pruned.achieved_sparsity == pytest.approx(1 - decoder_parameters(shrunk) / decoder_parameters(dense))
    save_checkpoint(shrunk, None, tmp_path)
    assert torch.equal(probe(load_checkpoint(tmp_path)), probe(shrunk))


def gain(model: PreTrainedModel, index: int, kind: str) -> Tensor:
    """What the stock norm behind an output makes of ones, or what the stock layer multiplies with; (C,) float64."""
    layer: Any = family_of(model).layers(model)[index]
    if model.config.model_type == "granite":
        return torch.full((model.config.hidden_size,), layer.residual_multiplier, dtype=torch.float64)
    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    if model.config.model_type == "glm4":
        names = ("post_self_attn_layernorm", "post_mlp_layernorm")
    with torch.no_grad():
        ones: Tensor = getattr(layer, names[kind == "mlp"])(torch.ones(model.config.hidden_size))
    return ones.double()


@pytest.mark.parametrize(
    ("name", "kind"),
    # the heads that stay of an OLMo-2 give something else without the others
    [
        (name, kind)
        for name in (*NORMED, "granite")
        for kind in ("attention", "mlp")
        if (name, kind) != ("olmo2", "attention")
    ],
)
def test_the_update_is_the_best_for_what_joins_the_stream(name: str, kind: str) -> None:
    """Against least squares of the errors behind the norm, its division frozen at what the dense linear gives."""
    dense = tiny_model(name, layers=2)
    calibration = windows(dense)
    config = slimgpt.Config(sparsity=0.2, split="ffn" if kind == "mlp" else "attention", dampening_frac=1e-8)
    masked, pruned = prune_copy(dense, config, calibration)
    report = pruned.layers[2 + (kind == "mlp")]
    assert report.kept < report.total
    with torch.no_grad(), recorded_inputs(masked) as seen:  # as the pruned layers before it give them
        masked(calibration.input_ids_NL)
    (X_TI,) = seen[report.name]
    W_OI, V_OI = (outputs(model)[report.name].weight.detach().double() for model in (dense, masked))
    weights_T = torch.ones(len(X_TI), dtype=torch.float64)
    if name != "granite":
        weights_T = 1 / ((X_TI @ W_OI.T).square().mean(1) + dense.config.rms_norm_eps)
    kept_I, root_T1, gain_O = V_OI.any(0), weights_T.sqrt()[:, None], gain(masked, 1, kind)
    best_KO = torch.linalg.lstsq(root_T1 * X_TI[:, kept_I], root_T1 * (X_TI @ W_OI.T)).solution
    torch.testing.assert_close(V_OI[:, kept_I], best_KO.T, atol=2e-3, rtol=2e-3)

    def energy(D_OI: Tensor) -> float:
        return float((weights_T * (X_TI @ D_OI.T * gain_O).square().sum(1)).mean())

    assert report.measured_error == pytest.approx(energy(W_OI - V_OI), rel=1e-3)
    assert report.output_energy == pytest.approx(energy(W_OI), rel=1e-3)


def test_the_choice_is_the_best_for_the_normed_output() -> None:
    """Every column of a tiny linear is tried: what goes is what costs least behind the norm, and it costs just that."""
    generator = torch.Generator().manual_seed(5)
    X_TI, W_OI, gain_O = (torch.randn(*size, generator=generator) for size in ((40, 6), (5, 6), (5,)))
    X_TI[::3] *= 9  # some tokens are large, which a norm does not let through
    weights_T = 1 / (X_TI @ W_OI.T).square().mean(1)
    accumulator = HessianAccumulator(6, "cpu")
    for part in range(2):  # weights go with their tokens, whatever the batches
        accumulator.add(X_TI[20 * part : 20 * part + 20], weights_T[20 * part : 20 * part + 20])
    problem = prepared("down_proj", W_OI, accumulator.finish("down_proj"), dampening_frac=0.0, scale_O=gain_O)
    root_T1, wanted_TO = weights_T.double().sqrt()[:, None], (X_TI @ W_OI.T).double()
    costs = []
    for column in range(6):
        rest = [index for index in range(6) if index != column]
        best = torch.linalg.lstsq(root_T1 * X_TI[:, rest].double(), root_T1 * wanted_TO).solution
        error_TO = root_T1 * (wanted_TO - X_TI[:, rest].double() @ best) * gain_O
        costs.append(float(error_TO.square().sum(1).mean()))
    found = eliminate_groups(problem, torch.arange(6)[:, None], iter([1]))
    assert found.order == (costs.index(min(costs)),)
    assert found.errors[0] == pytest.approx(min(costs), rel=1e-4)
    scores_N = group_scores(problem.counted(problem.W_OI), problem.inverse_II, torch.arange(6)[:, None])
    torch.testing.assert_close(scores_N, torch.tensor(costs, dtype=torch.float64), rtol=1e-4, atol=0)


def test_moments_of_weighted_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    X_TI, weights_T = torch.randn(50, 4, generator=generator) + 2, torch.rand(50, generator=generator)
    accumulator = MomentsAccumulator(4, "cpu")
    for part in (slice(0, 7), slice(7, 31), slice(31, 50)):
        accumulator.add(X_TI[part], weights_T[part])
    found = accumulator.finish("o_proj")
    X_TI, w_T1 = X_TI.double(), weights_T.double()[:, None]
    mean_I = (w_T1 * X_TI).sum(0) / w_T1.sum()
    torch.testing.assert_close(found.mean_I.double(), mean_I, atol=1e-5, rtol=1e-5)
    deviation_I = (w_T1 * (X_TI - mean_I).square()).sum(0)
    torch.testing.assert_close(found.variance_I.double(), deviation_I / 49, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.square_I.double(), (w_T1 * X_TI.square()).mean(0), atol=1e-5, rtol=1e-5)


def test_a_bias_behind_a_norm_is_what_the_columns_gave_on_average_to_the_stream() -> None:
    """FLAP adds it before the norm: of all constants it is the one that misses least behind it."""
    dense = tiny_model("gemma2", layers=1)
    calibration = windows(dense)
    masked, _ = prune_copy(dense, flap.Config(sparsity=0.3), calibration, method=flap)
    for name, linear in outputs(masked).items():
        with torch.no_grad(), recorded_inputs(dense) as seen:
            dense(calibration.input_ids_NL)
        (X_TI,), W_OI = seen[name], outputs(dense)[name].weight.detach().double()
        gone_I = ~linear.weight.any(0)
        weights_T1 = 1 / ((X_TI @ W_OI.T).square().mean(1) + dense.config.rms_norm_eps)[:, None]
        mean_I = (weights_T1 * X_TI).sum(0) / weights_T1.sum()
        expected_O = W_OI[:, gone_I] @ mean_I[gone_I]
        torch.testing.assert_close(linear.bias.detach().double(), expected_O, atol=1e-4, rtol=1e-4)


def test_a_stand_in_is_not_fitted_in_front_of_a_norm_and_fitted_through_a_multiplier() -> None:
    with pytest.raises(PruningError, match=r"in a gemma2 model a norm \(post_feedforward_layernorm\).*merge to none"):
        prune_copy(tiny_model("gemma2"), shortened.Config(layers=1, merge="linear"), method=shortened)
    dense = tiny_model("granite", layers=4)
    found = fit_stand_ins(ResidentDecoder(dense), windows(dense, num_samples=12), {2}, 0.1, CPU)[1]
    with torch.no_grad(), recorded_inputs(dense) as seen:
        states = dense(windows(dense, num_samples=12).input_ids_NL, output_hidden_states=True).hidden_states
    (X_TI,), m = seen[found.report.name], dense.config.residual_multiplier
    given_TO = m * X_TI @ outputs(dense)[found.report.name].weight.detach().double().T
    wanted_TO = (states[3] - states[2]).flatten(0, -2).double() + given_TO
    error = (wanted_TO - m * X_TI @ found.weight_OI.double().T).square().sum(1).mean()
    assert found.report.measured_error == pytest.approx(float(error), rel=1e-3)
    assert float(error) < float((wanted_TO - given_TO).square().sum(1).mean())


# fused linears


def llama_and_phi3() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same function twice: apart and fused."""
    llama, phi3 = tiny_model("llama", rms_norm_eps=1e-5), tiny_model("phi3", sliding_window=None)
    state = llama.state_dict()
    for index in range(3):
        attention, mlp = (f"model.layers.{index}.{part}" for part in ("self_attn", "mlp"))
        qkv = [state.pop(f"{attention}.{role}_proj.weight") for role in "qkv"]
        gate_up = [state.pop(f"{mlp}.{role}_proj.weight") for role in ("gate", "up")]
        state |= {f"{attention}.qkv_proj.weight": torch.cat(qkv), f"{mlp}.gate_up_proj.weight": torch.cat(gate_up)}
    phi3.load_state_dict(state)
    return llama, phi3


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (slimgpt, CONFIG),
        (llm_pruner, llm_pruner.Config(sparsity=0.3, protect_first=0, protect_last=0)),
        (magnitude, magnitude.Config(sparsity=0.3, head_unit="query_head")),
        (wanda_sp, wanda_sp.Config(sparsity=0.3, allocation="global")),
        (shortened, shortened.Config(layers=1, criterion="taylor")),
    ],
)
def test_fused_linears_lose_what_single_ones_lose(method: Any, config: Any) -> None:
    apart, fused = (prune_copy(model, config, method=method) for model in llama_and_phi3())
    assert fused[1].plan == apart[1].plan
    assert fused[1].achieved_sparsity == apart[1].achieved_sparsity
    torch.testing.assert_close(probe(fused[0]), probe(apart[0]), atol=1e-5, rtol=1e-5)


def test_a_part_of_a_fused_linear_is_no_target() -> None:
    model = tiny_model("phi3")
    for targets, asked in ((("q", "v"), "q, v"), (("up", "o"), "up")):
        config = lora.Config(targets=targets)
        with (
            pytest.raises(PruningError, match=rf"the targets {asked} are parts of one linear in a phi3 model"),
            merged_adapters(model, config),
        ):
            pass
    with merged_adapters(model, lora.Config(targets=("q", "k", "v"))) as adapted:
        names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(names) == 3
    assert all("qkv_proj" in name for name in names)


def test_a_longrope_phi3_with_fewer_heads_keeps_its_factors(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    config = {"rope_parameters": rope, "max_position_embeddings": 16, "original_max_position_embeddings": 8}
    for uneven in (True, False):
        model = tiny_model("phi3", **config)
        plan = plan_for(model, seed=3, drop=0)
        if not uneven:
            layers = tuple(plan.layers[0].model_copy(update={"layer": index}) for index in range(3))
            plan = plan.model_copy(update={"layers": layers})
        masked = copy.deepcopy(model)
        mask_(masked, plan)
        shrink_(model, plan)
        save_checkpoint(model, None, tmp_path / str(uneven), plan)
        loaded, ids = load_checkpoint(tmp_path / str(uneven)), random_ids(model, 2, 12)
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        torch.testing.assert_close(logits(loaded, ids), logits(masked, ids), atol=1e-5, rtol=1e-5)


# models of 2024 and 2025 that are of the older classes


QUIRKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1": ("llama", {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }, "rope_theta": 500000.0, "eos_token_id": [1, 3, 5]}),
    "falcon3": ("llama", {"head_dim": 16, "rope_theta": 1000042, "pretraining_tp": 1, "activation": "swiglu"}),
    "yi": ("llama", {"rope_theta": 5000000.0, "rope_scaling": None, "pretraining_tp": 1}),
    "qwen2.5": ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2, "rope_theta": 1e6}),
    "deepseek-r1-distill-qwen": ("qwen2", {"use_mrope": False, "use_sliding_window": False, "sliding_window": 8}),
    "mistral-7b-v0.1": ("mistral", {"sliding_window": 5, "rope_theta": 10000.0}),
    "gemma-3-4b": ("gemma3", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2}),
    "phi-4-mini": ("phi3", {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_scaling": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIRKS)
def test_published_configs_are_pruned_and_saved(name: str, tmp_path: Path) -> None:
    family, config = QUIRKS[name]
    own = {"head_dim", "use_sliding_window", "sliding_window", "max_window_layers"}  # the others change no weight
    model = tiny_model(family, **{key: value for key, value in config.items() if key in own})
    save_checkpoint(model, None, tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"  # as the hub has it: keys of older versions, and some of nobody's
    made = {"rope_parameters", "layer_types"}
    values = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in made}
    path.write_text(json.dumps(values | config))
    dense = load_checkpoint(tmp_path / "dense")
    plan = plan_for(dense, seed=1)
    masked, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
    mask_(masked, plan)
    shrink_(shrunk, plan)
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=0)
    save_checkpoint(shrunk, None, tmp_path / "pruned", plan)
    loaded = load_checkpoint(tmp_path / "pruned")
    assert torch.equal(probe(loaded), probe(shrunk))
    assert torch.equal(generate(loaded), generate(loaded, use_cache=False))
    rope = loaded.config.rope_parameters.get("full_attention", loaded.config.rope_parameters)
    assert rope["rope_theta"] == config.get("rope_theta", 10000.0)
    assert rope.get("factor") == (config.get("rope_scaling") or {}).get("factor")
    assert rope.get("partial_rotary_factor", 1.0) == config.get("partial_rotary_factor", 1.0)
