"""SlimGPT as a method: its Config, the statistics path, and the measured choice of the split."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from pruning import obs
from pruning.calibration import CalibrationSet
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.hessian import Hessian
from pruning.methods import slimgpt
from pruning.methods.slimgpt import Config
from pruning.pruned import Pruned
from pruning.schedule import Allocation, solve_budgets
from pruning.statistics import capture_statistics
from pruning.surgery import shrink_
from tests.pruning.captured import CPU, hooked_moments, logits, outputs, windows
from tests.tiny import FAMILIES, random_ids, tiny_model

SPLITS = {"equal": 1.0, "half": 0.5, "ffn": 0.0, "attention": math.inf}


def prune(model: PreTrainedModel, calibration: CalibrationSet | None = None, **config: Any) -> Pruned:
    config = {"sparsity": 0.3, "split": "equal"} | config
    return slimgpt.prune(model, calibration or windows(model), Config(**config), options=CPU)


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 0.0},
        {"sparsity": 1.0},
        {"sparsity": -0.2},
        {"sparsity": float("nan")},
        {"sparsity": "much"},
        {"curve": "log"},
        {"start_over_end": 0.0},
        {"start_over_end": 1.1},
        {"split": "third"},
        {"head_unit": "head"},
        {"group_size": 0},
        {"dampening_frac": 0.0},
        {"dampening_frac": -0.01},
        {"protect_first": -1},
        {"protect_last": 1.5},
        {"sparsty": 0.2},
    ],
    ids=str,
)
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**({"sparsity": 0.2} | wrong))


def test_config_needs_a_sparsity_and_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config()  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Config(sparsity=0.2).sparsity = 0.3  # type: ignore[misc]


def test_defaults_are_the_papers() -> None:
    config = Config(sparsity=0.2)
    assert (config.curve, config.start_over_end, config.propagate_error) == ("log_increase", 0.25, True)
    assert (config.grouped_cholesky, config.group_size) == (True, None)
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"split": "ffn"},
        {"split": "attention", "sparsity": 0.15},
        {"split": "half", "curve": "uniform"},
        {"curve": "linear_decrease"},
        {"head_unit": "query_head"},
        {"group_size": 4, "grouped_cholesky": False},
        {"protect_first": 1, "protect_last": 1, "sparsity": 0.2},
        {"dampening_frac": 0.1},
    ],
    ids=str,
)
def test_every_field_gives_a_valid_smaller_model(config: dict[str, Any]) -> None:
    model = tiny_model("llama")
    pruned = prune(model, **config)
    masked_logits, before = logits(model, random_ids(model)), decoder_parameters(model)
    cost = layer_cost(model)
    shrink_(model, pruned.plan)
    torch.testing.assert_close(logits(model, random_ids(model)), masked_logits, atol=1e-5, rtol=1e-5)
    removed = before - decoder_parameters(model)
    assert pruned.achieved_sparsity == pytest.approx(removed / before)
    unit = cost.per_kv_head + 2 * cost.per_query_head if config.get("split") == "attention" else cost.per_channel
    assert abs(removed - config.get("sparsity", 0.3) * before) <= unit
    assert pruned.split_kl == {}
    assert not math.isnan(pruned.layers[0].measured_error)


@pytest.mark.parametrize(
    "config",
    [
        {"split": "equal"},
        {"split": "half", "curve": "linear_increase"},
        {"split": "ffn", "curve": "log_decrease", "start_over_end": 0.6},
        {"split": "attention", "sparsity": 0.15, "curve": "uniform"},
        {"split": "equal", "curve": "linear_decrease", "start_over_end": 0.1, "head_unit": "query_head"},
    ],
    ids=str,
)
def test_widths_are_those_of_the_schedule(config: dict[str, Any]) -> None:
    model = tiny_model("llama", layers=5, heads=12, hidden=48, kv_heads=6)
    asked = {"sparsity": 0.3} | {name: value for name, value in config.items() if name != "split"}
    allocation = Allocation(**asked, attention_ratio=SPLITS[config["split"]])
    budgets = solve_budgets(shapes(model), layer_cost(model), allocation)
    for kept, budget in zip(prune(model, **config).plan.layers, budgets, strict=True):
        assert 48 - len(kept.kept_channels) == budget.channels
        if allocation.head_unit == "kv_group":
            assert 6 - len(kept.kept_kv_heads) == budget.head_units
        else:
            assert 12 - len(kept.kept_query_heads) == 6 * budget.head_units


def test_dampening_improves_the_condition() -> None:
    reports = [prune(tiny_model("llama"), dampening_frac=frac).layers[-1] for frac in (0.001, 0.1)]
    weak, strong = (report.condition for report in reports)
    assert weak is not None
    assert strong is not None
    assert weak > 2 * strong


def test_protected_layers_are_untouched() -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    pruned = prune(model, protect_first=1, protect_last=1, sparsity=0.2)
    for index in (0, 2):
        assert same_weights(model.model.layers[index], dense.model.layers[index])  # type: ignore[arg-type]
        assert pruned.plan.layers[index].shape == pruned.plan.source[index]


def test_progress_rises_to_one() -> None:
    model = tiny_model("llama")
    shares: list[float] = []
    config = Config(sparsity=0.3, split="auto")
    slimgpt.prune(model, windows(model), config, options=CPU, progress=lambda share, message: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_unreachable_sparsity_changes_nothing() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    with pytest.raises(PruningError, match=r"sparsity 0\.9 cannot be reached"):
        prune(model, sparsity=0.9, split="ffn")
    assert same_weights(model, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_propagation_each_linear_is_pruned_on_the_dense_models_inputs(name: str, tmp_path: Path) -> None:
    dense = tiny_model(name)
    calibration = windows(dense)
    config = Config(sparsity=0.3, split="equal", propagate_error=False)
    assert slimgpt.needs_statistics(config)
    assert not slimgpt.needs_statistics(Config(sparsity=0.3))
    capture_statistics(dense, calibration, tmp_path, CPU)
    model = copy.deepcopy(dense)
    pruned = slimgpt.prune(model, calibration, config, statistics=tmp_path, options=CPU)

    moments = hooked_moments(dense, calibration.input_ids_NL)
    budgets = solve_budgets(shapes(dense), layer_cost(dense), Allocation(sparsity=0.3))
    for number, (linear_name, linear) in enumerate(outputs(dense).items()):
        budget, kept = budgets[number // 2], pruned.plan.layers[number // 2]
        problem = obs.prepare(
            linear_name, linear.weight.detach(), Hessian(moments[linear_name], 144), dampening_frac=0.01
        )
        if "self_attn" in linear_name:
            columns_ND = torch.arange(linear.in_features).reshape(shapes(dense)[0].num_kv_heads, -1)
            sizes, expected = obs.fixed_group_sizes(budget.head_units, 1), kept.kept_kv_heads
        else:
            columns_ND = torch.arange(48).unsqueeze(1)
            sizes, expected = obs.halving_group_sizes(budget.channels), kept.kept_channels
        gone = obs.eliminate_groups(problem, columns_ND, sizes).order
        assert tuple(unit for unit in range(len(columns_ND)) if unit not in gone) == expected
        kept_K = columns_ND[list(expected)].flatten()
        actual_OI = outputs(model)[linear_name].weight.detach().double()
        refit_OK = obs.refit(problem, kept_K) if gone else linear.weight.detach().double()
        torch.testing.assert_close(actual_OI[:, kept_K], refit_OK, atol=1e-4, rtol=1e-3)
        assert float(actual_OI.abs().sum()) == pytest.approx(float(actual_OI[:, kept_K].abs().sum()))


def test_propagated_and_captured_hessians_differ_after_the_first_linear(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    calibration = windows(dense)
    capture_statistics(dense, calibration, tmp_path, CPU)
    walked = prune(copy.deepcopy(dense), calibration, curve="uniform")
    config = Config(sparsity=0.3, split="equal", curve="uniform", propagate_error=False)
    captured = slimgpt.prune(dense, calibration, config, statistics=tmp_path, options=CPU)
    assert captured.layers[0].measured_error == pytest.approx(walked.layers[0].measured_error, rel=1e-5)
    assert captured.layers[-1].output_energy != pytest.approx(walked.layers[-1].output_energy, rel=1e-3)


def test_without_propagation_statistics_are_needed() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    with pytest.raises(PruningError, match=r"propagate_error false.*statistics"):
        prune(model, propagate_error=False)
    assert same_weights(model, before)


def test_statistics_with_propagation_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    capture_statistics(model, windows(model), tmp_path, CPU)
    with pytest.raises(PruningError, match=r"propagate_error true.*statistics"):
        slimgpt.prune(model, windows(model), Config(sparsity=0.3), statistics=tmp_path, options=CPU)


def kl_of_logits(dense: PreTrainedModel, model: PreTrainedModel, calibration: CalibrationSet) -> float:
    ids_ML = calibration.heldout_ids_ML
    log_p, log_q = (logits(each, ids_ML).double().log_softmax(-1) for each in (dense, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_auto_keeps_the_split_with_the_smallest_heldout_kl(name: str, captured: bool, tmp_path: Path) -> None:
    dense = tiny_model(name)
    calibration = windows(dense)
    statistics = tmp_path if captured else None
    if captured:
        capture_statistics(dense, calibration, tmp_path, CPU)
    common: dict[str, Any] = {"sparsity": 0.3, "propagate_error": not captured}
    alone: dict[str, tuple[PreTrainedModel, Pruned]] = {}
    for split in ("equal", "half", "ffn"):
        model = copy.deepcopy(dense)
        config = Config(split=split, **common)  # type: ignore[arg-type]
        alone[split] = model, slimgpt.prune(model, calibration, config, statistics=statistics, options=CPU)
    chosen = copy.deepcopy(dense)
    pruned = slimgpt.prune(chosen, calibration, Config(split="auto", **common), statistics=statistics, options=CPU)
    expected = {split: kl_of_logits(dense, model, calibration) for split, (model, _) in alone.items()}
    assert pruned.split_kl == pytest.approx(expected, rel=1e-3)
    best = min(expected, key=lambda split: expected[split])
    assert pruned.plan == alone[best][1].plan
    assert pruned.achieved_sparsity == alone[best][1].achieved_sparsity
    assert same_weights(chosen, alone[best][0])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_with_many_windows_splits_compete_on_a_part_and_the_winner_is_pruned_with_all(name: str) -> None:
    dense = tiny_model(name)
    calibration = windows(dense, num_samples=40)
    # 4 tokens per input of the widest linear (48 channels; 64 head columns in qwen3), which is more than an eighth
    enough = {"llama": 8, "qwen3": 11}[name]
    part = CalibrationSet(calibration.input_ids_NL[:enough], calibration.heldout_ids_ML, {})
    expected: dict[str, float] = {}
    for split in ("equal", "half", "ffn"):
        scout = copy.deepcopy(dense)
        prune(scout, part, split=split)
        expected[split] = kl_of_logits(dense, scout, calibration)
    chosen, whole, best = copy.deepcopy(dense), copy.deepcopy(dense), min(expected, key=lambda split: expected[split])
    shares: list[float] = []
    config = Config(sparsity=0.3, split="auto")
    pruned = slimgpt.prune(
        chosen, calibration, config, options=CPU, progress=lambda share, message: shares.append(share)
    )
    assert pruned.split_kl == pytest.approx(expected, rel=1e-3)
    assert pruned.plan == prune(whole, calibration, split=best).plan
    assert same_weights(chosen, whole)
    assert {report.num_tokens for report in pruned.layers} == {40 * 24}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "tried"), [("llama", {"equal", "half", "ffn"}), ("llama-mha", set())])
def test_default_split_is_auto_with_grouped_heads_and_the_papers_without(name: str, tried: set[str]) -> None:
    model = tiny_model(name)
    assert set(prune(model, split=None).split_kl) == tried


def test_auto_without_heldout_windows() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    with pytest.raises(PruningError, match=r"split 'auto' .*num_heldout.*equal, half, ffn, attention"):
        prune(model, windows(model, num_heldout=0), split="auto")
    assert same_weights(model, before)


def test_auto_leaves_out_splits_that_cannot_reach_the_sparsity() -> None:
    # all channels together are less than 70 % of the parameters here
    model = tiny_model("llama")
    with pytest.raises(PruningError, match="cannot be reached"):
        prune(copy.deepcopy(model), sparsity=0.7, split="ffn")
    pruned = prune(model, sparsity=0.7, split="auto")
    assert "equal" in pruned.split_kl
    assert "ffn" not in pruned.split_kl


def test_auto_when_no_split_reaches_the_sparsity() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    with pytest.raises(PruningError, match=r"sparsity 0\.97 cannot be reached"):
        prune(model, sparsity=0.97, split="auto")
    assert same_weights(model, before)


def test_a_model_pruned_once_can_be_pruned_again() -> None:
    model = tiny_model("llama", layers=4)
    first = prune(model, sparsity=0.2)
    shrink_(model, first.plan)
    second = prune(model, sparsity=0.2, split="auto")
    shrink_(model, second.plan)
    assert shapes(model) == first.plan.compose(second.plan).shapes
    assert family_of(model).name == "llama"
    assert torch.isfinite(logits(model, random_ids(model))).all()
