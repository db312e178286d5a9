"""Pruning each linear as its budget says: the plan names exactly the zeroed columns and the reports tell the truth."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning import obs
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.hessian import Hessian
from pruning.layerwise import Solver, SubLayerReport, prune_layerwise_
from pruning.plan import LayerShape, PruningPlan
from pruning.schedule import HeadUnit, LayerBudget, removed_parameters
from pruning.sequential import SubLayer, walk_layers
from pruning.surgery import mask_, shrink_
from tests.pruning.captured import CPU, hooked_moments, logits, outputs
from tests.tiny import FAMILIES, random_ids, tiny_model

BUDGETS = (LayerBudget(1, 5), LayerBudget(0, 20), LayerBudget(1, 0))


def solver(head_unit: HeadUnit = "kv_group", *, group_size: int | None = None, cholesky: bool = True) -> Solver:
    return Solver(dampening_frac=0.01, grouped_cholesky=cholesky, group_size=group_size, head_unit=head_unit)


def prune(
    model: PreTrainedModel,
    budgets: tuple[LayerBudget, ...] = BUDGETS,
    how: Solver | None = None,
    *,
    num_heldout: int = 2,
) -> tuple[PruningPlan, tuple[SubLayerReport, ...]]:
    family = family_of(model)
    walk = walk_layers(model, family, random_ids(model, 8, 24), CPU, num_heldout=num_heldout)
    return prune_layerwise_(walk, shapes(model), family.head_dim(model), budgets, how or solver())


def live_columns(linear: nn.Linear) -> list[int]:
    return linear.weight.abs().sum(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_what_the_columns_say(name: str, unit: HeadUnit) -> None:
    model = tiny_model(name)
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    budgets = BUDGETS if name != "llama-mha" or unit == "kv_group" else (LayerBudget(0, 5),) * 3
    plan, reports = prune(model, budgets, solver(unit))
    family = family_of(model)
    head_dim = family.head_dim(model)
    for index, (kept, layer) in enumerate(zip(plan.layers, family.layers(model), strict=True)):
        columns = [head * head_dim + offset for head in kept.kept_query_heads for offset in range(head_dim)]
        assert live_columns(family.o_proj(layer)) == columns
        assert live_columns(family.down_proj(layer)) == list(kept.kept_channels)
        assert len(kept.kept_channels) == 48 - budgets[index].channels
        attention, mlp = reports[2 * index : 2 * index + 2]
        assert (attention.layer, attention.sub_layer, mlp.layer, mlp.sub_layer) == (index, "attention", index, "mlp")
        assert (mlp.kept, mlp.total) == (len(kept.kept_channels), 48)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, untouched[key])}
    pruned = [report for report in reports if report.kept < report.total]
    assert changed == {f"{report.name}.weight" for report in pruned}


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_head_units(name: str, unit: HeadUnit) -> None:
    model = tiny_model(name, heads=12, kv_heads=3, hidden=48)
    dense = shapes(model)[0]
    plan, reports = prune(model, (LayerBudget(1, 0), LayerBudget(2, 0), LayerBudget(0, 0)), solver(unit))
    for kept, units in zip(plan.layers, (1, 2, 0), strict=True):
        per_group = Counter(dense.kv_head_of(head) for head in kept.kept_query_heads)
        if unit == "kv_group":
            assert len(kept.kept_kv_heads) == 3 - units
            assert per_group == dict.fromkeys(kept.kept_kv_heads, 4)
        else:
            assert kept.kept_kv_heads == (0, 1, 2)
            assert per_group == dict.fromkeys(range(3), 4 - units)
    assert reports[2].total == (3 if unit == "kv_group" else 12)


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_equals_shrunk(name: str, unit: HeadUnit) -> None:
    model = tiny_model(name)
    dense_logits = logits(model, random_ids(model))
    budgets = BUDGETS if name != "llama-mha" or unit == "kv_group" else (LayerBudget(0, 5),) * 3
    plan, _ = prune(model, budgets, solver(unit))
    before, shapes_before, cost = decoder_parameters(model), shapes(model), layer_cost(model)
    # masking the rows of what no output column reads changes nothing: they were dead already
    masked, shrunk = copy.deepcopy(model), copy.deepcopy(model)
    mask_(masked, plan)
    shrink_(shrunk, plan)
    pruned_logits = logits(model, random_ids(model))
    torch.testing.assert_close(logits(masked, random_ids(model)), pruned_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(shrunk, random_ids(model)), pruned_logits, atol=1e-5, rtol=1e-5)
    assert (pruned_logits - dense_logits).abs().max() > 1e-3
    assert before - decoder_parameters(shrunk) == removed_parameters(budgets, shapes_before, cost, unit)


def test_weights_are_the_least_squares_fit_on_the_changed_inputs() -> None:
    dense = tiny_model("llama")
    model = copy.deepcopy(dense)
    ids_NL = random_ids(model, 8, 24)
    _, reports = prune(model)
    moments = hooked_moments(model, ids_NL[:6])  # inputs of each linear as the pruned model gives them
    heldout = hooked_moments(model, ids_NL[6:])
    for report, (name, linear) in zip(reports, outputs(model).items(), strict=True):
        H_II, W_OI = moments[name], outputs(dense)[name].weight.detach().double()
        damped_II = H_II + 0.01 * H_II.diagonal().mean() * torch.eye(len(H_II), dtype=torch.float64)
        kept = live_columns(linear)
        expected_OI = torch.zeros_like(W_OI)
        expected_OI[:, kept] = W_OI @ damped_II[:, kept] @ damped_II[kept][:, kept].inverse()
        torch.testing.assert_close(linear.weight.detach().double(), expected_OI, atol=1e-4, rtol=1e-3)
        direct = _output_error(W_OI, linear.weight.detach().double(), H_II)
        assert report.measured_error == pytest.approx(direct, rel=1e-3, abs=1e-9)
        direct = _output_error(W_OI, linear.weight.detach().double(), heldout[name])
        assert report.heldout_error == pytest.approx(direct, rel=1e-3, abs=1e-9)


def _output_error(W_OI: Tensor, pruned_OI: Tensor, H_II: Tensor) -> float:
    difference_OI = W_OI - pruned_OI
    return float(torch.trace(difference_OI @ H_II @ difference_OI.T))


@pytest.mark.parametrize("cholesky", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_reports_are_sane(name: str, cholesky: bool) -> None:
    model = tiny_model(name)
    _, reports = prune(model, how=solver(cholesky=cholesky))
    assert [report.name for report in reports] == list(outputs(model))
    for report in reports:
        assert report.num_tokens == 6 * 24
        assert report.seconds >= 0
        assert (report.condition is None) if report.kept == report.total else (report.condition or 0) >= 1
        assert report.heldout_error is not None
        if report.kept == report.total:
            assert report.predicted_error == report.measured_error == report.heldout_error == 0
        else:
            # the prediction also counts the dampening; removing everything would cost the energy
            assert 0 < report.measured_error <= report.predicted_error <= 1.05 * report.output_energy
            assert report.heldout_error > 0


def test_no_heldout_samples_no_heldout_error() -> None:
    _, reports = prune(tiny_model("llama"), num_heldout=0)
    assert all(report.heldout_error is None for report in reports)


def test_one_channel_a_round_removes_no_worse_channels_than_many() -> None:
    dense = tiny_model("llama")
    budgets = (LayerBudget(0, 30),) * 3
    first_errors = {size: prune(copy.deepcopy(dense), budgets, solver(group_size=size))[1][1] for size in (1, 30)}
    assert first_errors[1].predicted_error < first_errors[30].predicted_error


def test_without_budget_the_weights_stay_to_the_bit() -> None:
    model = tiny_model("qwen2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan, _ = prune(model, (LayerBudget(0, 0),) * 3)
    assert plan == PruningPlan.full(shapes(model), 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def by_hand(linear: nn.Linear, matrix_II: Tensor, heldout_II: Tensor | None = None) -> list[SubLayer]:
    """One layer of 2 heads x 3 and 6 channels whose both linears are `linear` with these Hessians."""
    heldout = None if heldout_II is None else Hessian(heldout_II, 9)
    attention = nn.Linear(6, 4)
    return [
        SubLayer(0, "attention", "o_proj", attention, Hessian(torch.eye(6), 50), heldout),
        SubLayer(0, "mlp", "down_proj", linear, Hessian(matrix_II, 50), heldout),
    ]


SHAPE = LayerShape(num_heads=2, num_kv_heads=2, intermediate_size=6)


def test_a_linear_that_loses_nothing_has_no_heldout_error_either() -> None:
    # an input that the calibration never saw alive, but the held-out windows did
    matrix_II = torch.eye(6)
    matrix_II[2, 2] = 0
    sub_layers = by_hand(nn.Linear(6, 4), matrix_II, torch.eye(6))
    _, reports = prune_layerwise_(sub_layers, [SHAPE], 3, [LayerBudget(0, 0)], solver())
    assert reports[1].heldout_error == 0


def test_dead_channels_go_first() -> None:
    matrix_II = torch.eye(6)
    matrix_II[2, 2] = matrix_II[5, 5] = 0
    linear = nn.Linear(6, 4)
    plan, reports = prune_layerwise_(by_hand(linear, matrix_II), [SHAPE], 3, [LayerBudget(0, 2)], solver())
    assert plan.layers[0].kept_channels == (0, 1, 3, 4)
    assert reports[1].predicted_error == 0
    assert reports[1].measured_error == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("channels", [0, 6])
def test_all_channels_may_go_and_none_may_be_there(channels: int) -> None:
    shape, linear = SHAPE.model_copy(update={"intermediate_size": channels}), nn.Linear(6, 4)
    linear.weight, linear.in_features = nn.Parameter(linear.weight[:, :channels].detach().clone()), channels
    sub_layers = by_hand(linear, torch.eye(channels))
    plan, reports = prune_layerwise_(sub_layers, [shape], 3, [LayerBudget(0, channels)], solver())
    assert plan.layers[0].kept_channels == ()
    assert (reports[1].kept, reports[1].total) == (0, channels)
    assert reports[1].measured_error == pytest.approx(reports[1].output_energy)


def test_an_error_names_the_linear() -> None:
    with pytest.raises(PruningError, match=r"Hessian of down_proj \(50 tokens\) is not positive definite"):
        prune_layerwise_(by_hand(nn.Linear(6, 4), -torch.eye(6)), [SHAPE], 3, [LayerBudget(0, 2)], solver())


def test_bfloat16_weights_stay_bfloat16() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    plan, _ = prune(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert plan.layers[0].kept_channels == tuple(live_columns(family_of(model).down_proj(model.model.layers[0])))


def test_layers_are_told_as_they_finish() -> None:
    model, told = tiny_model("llama"), []
    walk = walk_layers(model, family_of(model), random_ids(model), CPU)
    prune_layerwise_(walk, shapes(model), 4, BUDGETS, solver(), on_layer=told.append)
    assert told == [0, 1, 2]


def test_query_heads_go_in_turns_over_the_groups() -> None:
    # group 0's heads are all cheaper than group 1's, and still each group gives one
    weight_OI = torch.cat([torch.full((4, 4), 0.1), torch.ones(4, 4)], dim=1) + 0.01 * torch.randn(
        4, 8, generator=torch.Generator().manual_seed(0)
    )
    linear = nn.Linear(8, 4)
    linear.weight.data = weight_OI
    shape = LayerShape(num_heads=4, num_kv_heads=2, intermediate_size=6)
    sub_layers = [
        SubLayer(0, "attention", "o_proj", linear, Hessian(torch.eye(8), 9)),
        *by_hand(nn.Linear(6, 4), torch.eye(6))[1:],
    ]
    plan, _ = prune_layerwise_(sub_layers, [shape], 2, [LayerBudget(1, 0)], solver("query_head"))
    assert [head // 2 for head in plan.layers[0].kept_query_heads] == [0, 1]
    problem = obs.prepare("o_proj", weight_OI, Hessian(torch.eye(8), 9), dampening_frac=0.01)
    scores = obs.group_scores(problem.W_OI, problem.inverse_II, torch.arange(8).reshape(4, 2))
    expected = [int(scores[2 * group : 2 * group + 2].argmax()) + 2 * group for group in range(2)]
    assert list(plan.layers[0].kept_query_heads) == expected


@pytest.mark.parametrize(("cholesky", "kept"), [(True, 0), (False, 1)])
def test_grouped_cholesky_sees_that_a_heads_columns_lean_on_each_other(cholesky: bool, kept: int) -> None:
    # head 0: each column alone could be made up for by the other, both together could not
    matrix_II = torch.eye(4)
    matrix_II[0, 1] = matrix_II[1, 0] = 0.99
    linear = nn.Linear(4, 1)
    linear.weight.data = torch.ones(1, 4)
    shape = LayerShape(num_heads=2, num_kv_heads=2, intermediate_size=6)
    mlp = by_hand(nn.Linear(6, 4), torch.eye(6))[1]
    sub_layers = [SubLayer(0, "attention", "o_proj", linear, Hessian(matrix_II, 9)), mlp]
    plan, _ = prune_layerwise_(sub_layers, [shape], 2, [LayerBudget(1, 0)], solver(cholesky=cholesky))
    assert plan.layers[0].kept_kv_heads == (kept,)
