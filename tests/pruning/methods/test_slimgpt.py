"""SlimGPT as a method: its Config, the statistics path, and the measured choice of the split."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from pruning.allocation.budget import Allocation, HeadUnit, LayerBudget, removed_parameters
from pruning.allocation.schedule import solve_budgets
from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.layerwise.capture import capture_statistics
from pruning.methods import slimgpt
from pruning.methods.slimgpt import Config
from pruning.obs import elimination, rounds
from pruning.obs.ridge import SHARES
from pruning.statistics.hessian import Hessian
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, hooked_moments, logits, outputs, prepared, prune_copy, same_weights, windows
from tests.tiny import FAMILIES, random_ids, tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

SPLITS = {"equal": 1.0, "half": 1 / 2, "third": 1 / 3, "ffn": 0.0, "attention": math.inf}
AUTO = ("ffn", "third", "half", "equal")
GROUPED = [name for name in FAMILIES if not name.endswith("mha") and name != "opt"]


def prune(
    model: PreTrainedModel,
    calibration: CalibrationSet | None = None,
    *,
    statistics: Path | None = None,
    progress: Callable[[float, str], None] = lambda share, message: None,
    **config: Any,
) -> tuple[PreTrainedModel, Pruned]:
    """A masked copy (the model itself stays as it was), and the outcome."""
    config = {"sparsity": 0.3, "split": "equal"} | config
    return prune_copy(model, Config(**config), calibration, statistics=statistics, progress=progress)


def capture(model: PreTrainedModel, calibration: CalibrationSet, folder: Path) -> None:
    capture_statistics(ResidentDecoder(model), calibration, folder, CPU)


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
        {"split": "most"},
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
    assert (config.split, config.head_unit, config.end_points) == (None, None, None)
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
        {"split": "auto"},
        {"split": None},
        {"split": "auto", "head_unit": "kv_group"},
        {"split": "half", "head_unit": "query_head", "curve": "uniform"},
        {"split": "third", "group_size": 1},
        {"group_size": 4, "grouped_cholesky": False},
        {"protect_first": 1, "protect_last": 1, "sparsity": 0.2},
        {"dampening_frac": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_gives_a_valid_smaller_model(name: str, config: dict[str, Any]) -> None:
    dense = tiny_model(name)
    if config.get("head_unit") == "query_head" and shapes(dense)[0].num_groups == 1:
        with pytest.raises(PruningError, match="head_unit 'query_head' takes query heads from groups"):
            prune(dense, **config)
        return
    model, pruned = prune(dense, **config)
    masked_logits, before = logits(model, random_ids(model)), decoder_parameters(model)
    cost = layer_cost(model)
    shrink_(model, pruned.plan)
    torch.testing.assert_close(logits(model, random_ids(model)), masked_logits, atol=1e-5, rtol=1e-5)
    removed = before - decoder_parameters(model)
    assert pruned.achieved_sparsity == pytest.approx(removed / before)
    unit = cost.per_channel
    if config.get("split") == "attention":
        unit = cost.per_kv_head + shapes(dense)[0].num_groups * cost.per_query_head
    assert abs(removed - config.get("sparsity", 0.3) * before) <= unit
    several = config.get("split", "equal") == "auto" or (config.get("split", "equal") is None and name in GROUPED)
    candidates = worth_trying(dense, config.get("sparsity", 0.3), config.get("head_unit") or unit_of(dense))
    assert (len(pruned.split_kl) >= 2) == (several and len(candidates) > 1)
    assert not math.isnan(pruned.layers[0].measured_error)


@pytest.mark.parametrize(
    "config",
    [
        {"split": "equal"},
        {"split": "half", "curve": "linear_increase"},
        {"split": "ffn", "curve": "log_decrease", "start_over_end": 0.6},
        {"split": "attention", "sparsity": 0.15, "curve": "uniform"},
        {"split": "third", "head_unit": "query_head"},
        {"split": "equal", "curve": "linear_decrease", "start_over_end": 0.1, "head_unit": "query_head"},
    ],
    ids=str,
)
def test_widths_are_those_of_the_schedule(config: dict[str, Any]) -> None:
    model = tiny_model("llama", layers=5, heads=12, hidden=48, kv_heads=6)
    asked = {"sparsity": 0.3} | {name: value for name, value in config.items() if name != "split"}
    allocation = Allocation(**asked, attention_ratio=SPLITS[config["split"]])
    budgets = solve_budgets(shapes(model), layer_cost(model), allocation)
    for kept, budget in zip(prune(model, **config)[1].plan.layers, budgets, strict=True):
        assert 48 - len(kept.kept_channels) == budget.channels
        if allocation.head_unit == "kv_group":
            assert 6 - len(kept.kept_kv_heads) == budget.head_units
        else:
            assert 12 - len(kept.kept_query_heads) == 6 * budget.head_units


def test_dampening_improves_the_condition() -> None:
    reports = [prune(tiny_model("llama"), dampening_frac=frac)[1].layers[-1] for frac in (0.001, 0.1)]
    weak, strong = (report.condition for report in reports)
    assert weak is not None
    assert strong is not None
    assert weak > 2 * strong


def test_protected_layers_are_untouched() -> None:
    dense = tiny_model("llama")
    model, pruned = prune(dense, protect_first=1, protect_last=1, sparsity=0.2)
    for index in (0, 2):
        assert same_weights(model.model.layers[index], dense.model.layers[index])
        assert pruned.plan.layers[index].shape == pruned.plan.source[index]


def test_progress_rises_to_one() -> None:
    shares: list[float] = []
    prune(tiny_model("llama"), progress=lambda share, message: shares.append(share))
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_unreachable_sparsity_is_refused_before_anything_is_walked() -> None:
    reported: list[float] = []
    for split in ("ffn", "auto"):
        with pytest.raises(PruningError, match=r"sparsity 0\.97 cannot be reached"):
            prune(
                tiny_model("llama"),
                sparsity=0.97,
                split=split,
                head_unit="kv_group",
                progress=lambda share, message: reported.append(share),
            )
    assert reported == []


@pytest.mark.parametrize("name", FAMILIES)
def test_without_propagation_each_linear_is_pruned_on_the_dense_models_inputs(name: str, tmp_path: Path) -> None:
    dense = tiny_model(name)
    calibration = windows(dense)
    assert slimgpt.needs_statistics(Config(sparsity=0.3, propagate_error=False))
    assert not slimgpt.needs_statistics(Config(sparsity=0.3))
    capture(dense, calibration, tmp_path)
    model, pruned = prune(dense, calibration, propagate_error=False, statistics=tmp_path)

    moments = hooked_moments(dense, calibration.input_ids_NL)
    budgets = solve_budgets(shapes(dense), layer_cost(dense), Allocation(sparsity=0.3))
    for number, (linear_name, linear) in enumerate(outputs(dense).items()):
        budget, kept = budgets[number // 2], pruned.plan.layers[number // 2]
        problem = prepared(linear_name, linear.weight.detach(), Hessian(moments[linear_name], 144), dampening_frac=0.01)
        if number % 2 == 0:
            columns_ND = torch.arange(linear.in_features).reshape(shapes(dense)[0].num_kv_heads, -1)
            sizes, expected = rounds.fixed_group_sizes(budget.head_units, 1), kept.kept_kv_heads
        else:
            columns_ND = torch.arange(48).unsqueeze(1)
            sizes, expected = rounds.halving_group_sizes(budget.channels), kept.kept_channels
        gone = elimination.eliminate_groups(problem, columns_ND, sizes).order
        assert tuple(unit for unit in range(len(columns_ND)) if unit not in gone) == expected
        kept_K = columns_ND[list(expected)].flatten()
        actual_OI = outputs(model)[linear_name].weight.detach().double()
        refit_OK = elimination.refit(problem, kept_K) if gone else linear.weight.detach().double()
        torch.testing.assert_close(actual_OI[:, kept_K], refit_OK, atol=1e-4, rtol=1e-3)
        assert float(actual_OI.abs().sum()) == pytest.approx(float(actual_OI[:, kept_K].abs().sum()))


def test_propagated_and_captured_hessians_differ_after_the_first_linear(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    calibration = windows(dense)
    capture(dense, calibration, tmp_path)
    _, walked = prune(dense, calibration, curve="uniform")
    _, captured = prune(dense, calibration, curve="uniform", propagate_error=False, statistics=tmp_path)
    assert captured.layers[0].measured_error == pytest.approx(walked.layers[0].measured_error, rel=1e-5)
    assert captured.layers[-1].output_energy != pytest.approx(walked.layers[-1].output_energy, rel=1e-3)


def test_without_propagation_statistics_are_needed() -> None:
    with pytest.raises(PruningError, match=r"propagate_error false.*statistics"):
        prune(tiny_model("llama"), propagate_error=False)


def test_statistics_with_propagation_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    capture(model, windows(model), tmp_path)
    with pytest.raises(PruningError, match=r"propagate_error true.*statistics"):
        prune(model, statistics=tmp_path)


def kl_of_logits(dense: PreTrainedModel, model: PreTrainedModel, calibration: CalibrationSet) -> float:
    ids_ML = calibration.heldout_ids_ML
    log_p, log_q = (logits(each, ids_ML).double().log_softmax(-1) for each in (dense, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def worth_trying(model: PreTrainedModel, sparsity: float, unit: HeadUnit) -> list[str]:
    """The splits that reach the sparsity and take at most 0.65 of the channels; if none does, those that reach it."""
    widths, taken = shapes(model), {}
    for split in AUTO:
        allocation = Allocation(sparsity=sparsity, attention_ratio=SPLITS[split], head_unit=unit)
        try:
            budgets = solve_budgets(widths, layer_cost(model), allocation)
        except PruningError:
            continue
        taken[split] = sum(budget.channels for budget in budgets) / sum(width.intermediate_size for width in widths)
    return [split for split, share in taken.items() if share <= 0.65] or list(taken)


def unit_of(model: PreTrainedModel) -> HeadUnit:
    return "query_head" if shapes(model)[0].num_groups > 1 else "kv_group"


def judged(candidates: list[str], kl: dict[str, float]) -> tuple[list[str], str]:
    """Those that are tried, up to the first that does not gain a tenth on the one before it; and the last that does."""
    for number, name in enumerate(candidates[1:], start=1):
        if kl[name] > 0.9 * kl[candidates[number - 1]]:
            return candidates[: number + 1], candidates[number - 1]
    return candidates, candidates[-1]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, "llama-many"])
def test_auto_takes_more_of_attention_while_the_heldout_kl_falls_by_a_tenth(
    name: str, captured: bool, tmp_path: Path
) -> None:
    # "llama-many": so much attention that taking none of it is worst
    dense = tiny_model("llama", head_dim=8, intermediate=24) if name == "llama-many" else tiny_model(name)
    calibration = windows(dense)
    statistics = tmp_path if captured else None
    if captured:
        capture(dense, calibration, tmp_path)
    common: dict[str, Any] = {"sparsity": 0.2, "propagate_error": not captured, "statistics": statistics}
    unit, candidates = unit_of(dense), worth_trying(dense, 0.2, unit_of(dense))
    alone = {split: prune(dense, calibration, split=split, head_unit=unit, **common) for split in candidates}
    chosen, pruned = prune(dense, calibration, split="auto", **common)
    expected = {split: kl_of_logits(dense, model, calibration) for split, (model, _) in alone.items()}
    tried, best = judged(candidates, expected)
    assert list(pruned.split_kl) == tried
    assert pruned.split == best
    assert pruned.split_kl == pytest.approx({split: expected[split] for split in tried}, rel=1e-3)
    assert pruned.plan == alone[best][1].plan
    assert pruned.achieved_sparsity == alone[best][1].achieved_sparsity
    assert same_weights(chosen, alone[best][0])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_with_many_windows_splits_compete_on_a_part_and_the_winner_is_pruned_with_all(name: str) -> None:
    dense = tiny_model(name)
    calibration = windows(dense, num_samples=40, num_heldout=88)
    # 3 tokens per input of the widest linear (48 channels; 64 head columns in qwen3)
    enough = {"llama": 6, "qwen3": 8}[name]
    # and 2048 held-out tokens in windows of 24
    part = CalibrationSet(calibration.input_ids_NL[:enough], calibration.heldout_ids_ML[:86], {})
    candidates = worth_trying(dense, 0.3, "query_head")
    scouts = {split: prune(dense, part, split=split, head_unit="query_head")[0] for split in candidates}
    expected = {split: kl_of_logits(dense, scout, part) for split, scout in scouts.items()}
    shares: list[float] = []
    chosen, pruned = prune(dense, calibration, split="auto", progress=lambda share, message: shares.append(share))
    tried, best = judged(candidates, expected)
    assert list(pruned.split_kl) == tried
    assert pruned.split == best
    assert pruned.split_kl == pytest.approx({split: expected[split] for split in tried}, rel=1e-3)
    whole, outcome = prune(dense, calibration, split=best, head_unit="query_head")
    assert pruned.plan == outcome.plan
    assert same_weights(chosen, whole)
    assert {report.num_tokens for report in pruned.layers} <= {40 * 24, 0}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_measured_with_grouped_heads_and_the_papers_without(name: str) -> None:
    model = tiny_model(name)
    _, pruned = prune(model, split=None)
    if name in GROUPED:
        _, explicit = prune(model, split="auto", head_unit="query_head")
        assert pruned.split_kl == explicit.split_kl
        assert list(pruned.split_kl)[:2] == worth_trying(model, 0.3, "query_head")[:2]
        assert all(len(kept.kept_kv_heads) == 4 for kept in pruned.plan.layers)
    else:
        _, explicit = prune(model, split="equal", head_unit="kv_group")
        assert pruned.split_kl == {}
        assert any(len(kept.kept_kv_heads) < 8 for kept in pruned.plan.layers)
    assert pruned.plan == explicit.plan


@pytest.mark.parametrize("propagate", [True, False])
def test_the_heldout_windows_choose_the_ridge_of_every_refit(propagate: bool, tmp_path: Path) -> None:
    """By the share that the report names: with it for all linears, no linear errs less on the held-out windows."""
    model = tiny_model("llama")
    calibration = windows(model, 6, 3)
    statistics = None if propagate else tmp_path
    if statistics is not None:
        capture(model, calibration, statistics)

    def pruned(**config: Any) -> tuple[PreTrainedModel, Pruned]:
        return prune(model, calibration, statistics=statistics, propagate_error=propagate, **config)

    by_diagonal, plain = pruned(ridge="diagonal", dampening_frac=0.1)
    by_heldout, chosen = pruned(ridge="heldout", dampening_frac=0.1)
    cut = [report for report in chosen.layers if report.kept < report.total]
    assert cut
    assert all(report.ridge in SHARES for report in cut)
    assert len({report.ridge for report in cut}) > 1
    assert all(report.ridge is None for report in plain.layers)
    assert not same_weights(by_diagonal, by_heldout)
    # as long as the inputs are the same, the choice can only gain
    alike = zip(plain.layers, chosen.layers, strict=True)
    compared = [(one, other) for one, other in alike if other.ridge is not None][: 1 if propagate else None]
    for one, other in compared:
        assert one.heldout_error is not None
        assert other.heldout_error is not None
        assert other.heldout_error <= one.heldout_error * (1 + 1e-4)


def test_a_ridge_by_heldout_windows_needs_some() -> None:
    model = tiny_model("llama")
    with pytest.raises(PruningError, match=r"ridge 'heldout' is chosen by held-out .* set calibration\.num_heldout"):
        prune(model, windows(model, 4, 0), ridge="heldout")


def test_orders_are_those_of_the_ridge_that_chooses_what_goes() -> None:
    orders = {ridge: slimgpt.order_config(Config(sparsity=0.3, propagate_error=False, ridge=ridge))
              for ridge in ("mean", "diagonal", "heldout")}  # fmt: skip
    assert orders["heldout"] == orders["diagonal"] != orders["mean"]
    assert orders["mean"] is not None
    assert "ridge" not in orders["mean"].model_dump(), "keys of before stay"


def test_auto_without_heldout_windows() -> None:
    model = tiny_model("llama")
    with pytest.raises(PruningError, match=r"split 'auto' .*num_heldout.*choose a split: ffn, third, half, equal"):
        prune(model, windows(model, num_heldout=0), split="auto")


def test_auto_leaves_out_splits_that_cannot_reach_the_sparsity() -> None:
    # all channels together are less than 70 % of the parameters here
    model = tiny_model("llama")
    with pytest.raises(PruningError, match="cannot be reached"):
        prune(model, sparsity=0.7, split="ffn")
    _, pruned = prune(model, sparsity=0.7, split="auto", head_unit="kv_group")
    assert list(pruned.split_kl)[:2] == ["third", "half"]


def test_auto_leaves_out_splits_that_leave_little_of_the_ffn() -> None:
    model = tiny_model("qwen3")
    assert prune(model, sparsity=0.3, split="ffn")[1].plan.shapes  # it could be done
    _, pruned = prune(model, sparsity=0.3, split="auto")
    assert next(iter(pruned.split_kl)) == worth_trying(model, 0.3, "query_head")[0] != "ffn"
    assert sum(shape.intermediate_size for shape in pruned.plan.shapes) >= 0.4 * 3 * 48


@pytest.mark.parametrize("name", FAMILIES)
def test_end_points_are_taken_as_they_are_and_leave_auto_nothing_to_choose(name: str) -> None:
    model = tiny_model(name)
    dense, cost = shapes(model), layer_cost(model)
    units = dense[0].num_kv_heads
    budgets = [LayerBudget(units * quarters // 4, 48 * quarters // 4) for quarters in (0, 1, 2)]
    total = sum(cost.parameters(shape) for shape in dense)
    sparsity = removed_parameters(budgets, dense, cost, "kv_group") / total
    asked = {"sparsity": sparsity, "end_points": (0.0, 0.5), "curve": "linear_increase", "head_unit": "kv_group"}
    masked, pruned = prune(model, split="equal", **asked)
    assert pruned.achieved_sparsity == pytest.approx(sparsity)
    assert [kept.shape.intermediate_size for kept in pruned.plan.layers] == [48, 36, 24]
    assert [kept.shape.num_kv_heads for kept in pruned.plan.layers] == [units, 3 * units // 4, units // 2]
    with pytest.raises(PruningError, match=r"end_points \(0\.0, 0\.5\)"):
        prune(model, split="ffn", **asked)
    chosen, outcome = prune(model, split="auto", **asked)
    assert outcome.split_kl == {}
    assert outcome.plan == pruned.plan
    assert same_weights(chosen, masked)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_pruned_once_can_be_pruned_again(name: str) -> None:
    model, first = prune(tiny_model(name, layers=4), sparsity=0.2)
    shrink_(model, first.plan)
    again, second = prune(model, sparsity=0.2, split="auto")
    masked_logits = logits(again, random_ids(again))
    shrink_(again, second.plan)
    assert shapes(again) == first.plan.compose(second.plan).shapes
    assert family_of(again) is family_of(tiny_model(name))
    torch.testing.assert_close(logits(again, random_ids(again)), masked_logits, atol=1e-5, rtol=1e-5)
