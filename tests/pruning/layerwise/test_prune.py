"""Pruning each linear as its budget says: the plan names exactly the zeroed columns and the reports tell the truth."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Generator, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.activations.activations import MemoryActivations
from pruning.allocation.budget import HeadUnit, LayerBudget, removed_parameters
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.errors import PruningError
from pruning.families import FAMILIES as ROWS
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.layerwise.kl import final_stream
from pruning.layerwise.prune import prune_layerwise_, sub_layers_to_prune
from pruning.obs import elimination
from pruning.obs.groups import Solver
from pruning.plan import LayerShape, PruningPlan
from pruning.statistics.hessian import Hessian
from pruning.walk.sequential import walk_layers
from pruning.walk.state import LayerEntry, MemoryWalkState, SubLayerReport, WalkedLayer
from pruning.walk.sub_layer import SubLayer
from tests.pruning.captured import CPU, hooked_moments, logits, outputs, prepared, same_weights
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
    all_wanted: bool = False,
) -> tuple[PreTrainedModel, PruningPlan, tuple[SubLayerReport, ...]]:
    """A masked copy of the model, and the entries of the walk state taken apart; the model stays as it was."""
    masked, decoder, walk_state = copy.deepcopy(model), ResidentDecoder(model), MemoryWalkState()
    head_dim = decoder.family.head_dim(model)
    walk = walk_layers(
        decoder,
        random_ids(model, 8, 24),
        CPU,
        num_heldout=num_heldout,
        wanted=(lambda layer, kind: True) if all_wanted else sub_layers_to_prune(budgets),
        walk_state=walk_state,
    )
    prune_layerwise_(walk, shapes(model), head_dim, budgets, how or solver(), walk_state)
    assert same_weights(model, masked)
    walk_state.apply_(masked)
    plan = PruningPlan(
        source=shapes(model), head_dim=head_dim, layers=tuple(entry.plan for entry in walk_state.entries)
    )
    return masked, plan, tuple(report for entry in walk_state.entries for report in entry.reports)


def possible(model: PreTrainedModel, unit: HeadUnit) -> tuple[LayerBudget, ...]:
    """Where every query head has its own kv head, none can go from every group."""
    budgets = BUDGETS
    if unit == "query_head" and shapes(model)[0].num_groups == 1:
        budgets = tuple(LayerBudget(0, budget.channels) for budget in BUDGETS)
    return budgets


def live_columns(linear: nn.Linear) -> list[int]:
    return linear.weight.abs().sum(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_what_the_columns_say(name: str, unit: HeadUnit) -> None:
    dense = tiny_model(name)
    untouched, budgets = dense.state_dict(), possible(dense, unit)
    model, plan, reports = prune(dense, budgets, solver(unit))
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
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi"])
def test_head_units(name: str, unit: HeadUnit) -> None:
    model = tiny_model(name, heads=12, kv_heads=3, hidden=48)
    dense = shapes(model)[0]
    _, plan, reports = prune(model, (LayerBudget(1, 0), LayerBudget(2, 0), LayerBudget(0, 0)), solver(unit))
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
    dense = tiny_model(name)
    dense_logits, budgets = logits(dense, random_ids(dense)), possible(dense, unit)
    model, plan, _ = prune(dense, budgets, solver(unit))
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


@pytest.mark.parametrize(("name", "all_wanted"), [(name, False) for name in FAMILIES] + [("llama", True)])
def test_weights_are_the_least_squares_fit_on_the_changed_inputs(name: str, all_wanted: bool) -> None:
    dense = tiny_model(name)
    ids_NL = random_ids(dense, 8, 24)
    model, _, reports = prune(dense, all_wanted=all_wanted)
    moments = hooked_moments(model, ids_NL[:6])  # inputs of each linear as the pruned model gives them
    heldout = hooked_moments(model, ids_NL[6:])
    for report, (linear_name, linear) in zip(reports, outputs(model).items(), strict=True):
        assert report.name == linear_name
        H_II, W_OI = moments[linear_name], outputs(dense)[linear_name].weight.detach().double()
        if report.kept == report.total:
            assert torch.equal(linear.weight, outputs(dense)[linear_name].weight)
            continue
        damped_II = H_II + 0.01 * H_II.diagonal().mean() * torch.eye(len(H_II), dtype=torch.float64)
        kept = live_columns(linear)
        expected_OI = torch.zeros_like(W_OI)
        expected_OI[:, kept] = W_OI @ damped_II[:, kept] @ damped_II[kept][:, kept].inverse()
        torch.testing.assert_close(linear.weight.detach().double(), expected_OI, atol=1e-4, rtol=1e-3)
        direct = _output_error(W_OI, linear.weight.detach().double(), H_II)
        assert report.measured_error == pytest.approx(direct, rel=1e-3, abs=1e-9)
        assert report.output_energy == pytest.approx(_output_error(W_OI, 0 * W_OI, H_II), rel=1e-3)
        direct = _output_error(W_OI, linear.weight.detach().double(), heldout[linear_name])
        assert report.heldout_error == pytest.approx(direct, rel=1e-3, abs=1e-9)


def _output_error(W_OI: Tensor, pruned_OI: Tensor, H_II: Tensor) -> float:
    difference_OI = W_OI - pruned_OI
    return float(torch.trace(difference_OI @ H_II @ difference_OI.T))


@pytest.mark.parametrize("cholesky", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_reports_are_sane(name: str, cholesky: bool) -> None:
    model = tiny_model(name)
    _, _, reports = prune(model, how=solver(cholesky=cholesky))
    assert [report.name for report in reports] == list(outputs(model))
    for report in reports:
        if report.kept == report.total:  # nothing was chosen, so nothing was measured
            assert report.predicted_error == report.measured_error == report.seconds == report.num_tokens == 0
            assert report.heldout_error is report.output_energy is report.condition is None
        else:
            assert report.num_tokens == 6 * 24
            assert report.seconds > 0
            assert (report.condition or 0) >= 1
            assert report.output_energy is not None
            # the prediction also counts the dampening; removing everything would cost the energy
            assert 0 < report.measured_error <= report.predicted_error <= 1.05 * report.output_energy
            assert (report.heldout_error or 0) > 0


def test_no_heldout_samples_no_heldout_error() -> None:
    _, _, reports = prune(tiny_model("llama"), num_heldout=0)
    assert all(report.heldout_error is None for report in reports)


def test_one_channel_a_round_removes_no_worse_channels_than_many() -> None:
    dense = tiny_model("llama")
    budgets = (LayerBudget(0, 30),) * 3
    first_errors = {size: prune(dense, budgets, solver(group_size=size))[2][1] for size in (1, 30)}
    assert first_errors[1].predicted_error < first_errors[30].predicted_error


def test_without_budget_the_weights_stay_to_the_bit() -> None:
    model = tiny_model("qwen2")
    masked, plan, _ = prune(model, (LayerBudget(0, 0),) * 3)
    assert plan == PruningPlan.full(shapes(model), 4)
    assert same_weights(masked, model)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_back_is_the_masked_models_heldout_stream(name: str) -> None:
    model, walk_state = tiny_model(name), MemoryWalkState()
    decoder, ids_NL = ResidentDecoder(model), random_ids(model, 8, 24)
    walk = walk_layers(decoder, ids_NL, CPU, num_heldout=2, walk_state=walk_state)
    head_dim = decoder.family.head_dim(model)
    stream_MLC = prune_layerwise_(walk, shapes(model), head_dim, BUDGETS, solver(), walk_state)
    masked = copy.deepcopy(model)
    walk_state.apply_(masked)
    expected_MLC = final_stream(ResidentDecoder(masked), ids_NL[6:], CPU)
    torch.testing.assert_close(stream_MLC, expected_MLC, atol=1e-5, rtol=1e-5)


def test_only_what_loses_something_wants_a_hessian() -> None:
    wanted = sub_layers_to_prune([LayerBudget(1, 0), LayerBudget(0, 2), LayerBudget(0, 0)])
    answers = [(wanted(layer, "attention"), wanted(layer, "mlp")) for layer in range(3)]
    assert answers == [(True, False), (False, True), (False, False)]


def by_hand(linear: nn.Linear, matrix_II: Tensor, heldout_II: Tensor | None = None) -> list[SubLayer]:
    """One layer of 2 heads x 3 and 6 channels whose both linears are `linear` with these Hessians."""
    heldout = None if heldout_II is None else Hessian(heldout_II, 9)
    attention = nn.Linear(6, 4)
    return [
        SubLayer(0, "attention", "o_proj", attention, Hessian(torch.eye(6), 50), heldout),
        SubLayer(0, "mlp", "down_proj", linear, Hessian(matrix_II, 50), heldout),
    ]


def solve(
    sub_layers: Sequence[SubLayer],
    shape: LayerShape,
    head_dim: int,
    budget: LayerBudget,
    how: Solver,
    *,
    measured: bool = True,
) -> LayerEntry:
    """The walk state's entry of one layer whose linears are offered as by a walk."""
    (llama,) = (row for row in ROWS if row.name == "llama")
    walk_state, module = MemoryWalkState(), nn.Module()
    module.self_attn, module.mlp = nn.Module(), nn.Module()
    module.self_attn.o_proj, module.mlp.down_proj = (sub_layer.linear for sub_layer in sub_layers)

    def walk() -> Generator[SubLayer, None, Tensor]:
        yield from sub_layers
        walk_state.layer_done(WalkedLayer(0, module, llama, MemoryActivations((1, 4), torch.float32), ()))
        return torch.empty(0, 1, 4)

    prune_layerwise_(walk(), [shape], head_dim, [budget], how, walk_state, measured=measured)
    (entry,) = walk_state.entries
    return entry


SHAPE = LayerShape(num_heads=2, num_kv_heads=2, intermediate_size=6)


def test_a_linear_that_loses_nothing_keeps_even_its_dead_columns() -> None:
    # an input that the calibration never saw alive, but the held-out windows did
    matrix_II = torch.eye(6)
    matrix_II[2, 2] = 0
    linear = nn.Linear(6, 4)
    before_OI = linear.weight.detach().clone()
    entry = solve(by_hand(linear, matrix_II, torch.eye(6)), SHAPE, 3, LayerBudget(0, 0), solver())
    assert torch.equal(linear.weight, before_OI)
    assert entry.reports[1].measured_error == 0
    assert entry.reports[1].heldout_error is None


def test_a_linear_that_loses_nothing_needs_no_hessian() -> None:
    sub_layers = [
        SubLayer(0, "attention", "o_proj", nn.Linear(6, 4), None),
        SubLayer(0, "mlp", "down_proj", nn.Linear(6, 4), None),
    ]
    entry = solve(sub_layers, SHAPE, 3, LayerBudget(0, 0), solver())
    assert entry.plan == PruningPlan.full([SHAPE], 3).layers[0]


def test_dead_channels_go_first() -> None:
    matrix_II = torch.eye(6)
    matrix_II[2, 2] = matrix_II[5, 5] = 0
    linear = nn.Linear(6, 4)
    entry = solve(by_hand(linear, matrix_II), SHAPE, 3, LayerBudget(0, 2), solver())
    assert entry.plan.kept_channels == (0, 1, 3, 4)
    assert entry.reports[1].predicted_error == 0
    assert entry.reports[1].measured_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("channels", [0, 6])
def test_all_channels_may_go_and_none_may_be_there(channels: int) -> None:
    shape, linear = SHAPE.model_copy(update={"intermediate_size": channels}), nn.Linear(6, 4)
    linear.weight, linear.in_features = nn.Parameter(linear.weight[:, :channels].detach().clone()), channels
    sub_layers = by_hand(linear, torch.eye(channels))
    entry = solve(sub_layers, shape, 3, LayerBudget(0, channels), solver())
    assert entry.plan.kept_channels == ()
    assert (entry.reports[1].kept, entry.reports[1].total) == (0, channels)
    assert entry.reports[1].measured_error == pytest.approx(entry.reports[1].output_energy or 0)
    assert (entry.reports[1].measured_error > 0) == (channels > 0)


def test_an_error_names_the_linear() -> None:
    with pytest.raises(PruningError, match=r"Hessian of down_proj \(50 tokens\) is not positive definite"):
        solve(by_hand(nn.Linear(6, 4), -torch.eye(6)), SHAPE, 3, LayerBudget(0, 2), solver())


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(("spoilt", "warns"), [(1e-6, False), (1e-2, True)])
def test_a_search_that_rounding_spoilt_is_warned_of(
    spoilt: float, warns: bool, measured: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every round of the search lost digits; the weights are refitted all the same."""
    group_scores = elimination.group_scores

    def spoiling(W_OI: Tensor, inverse_II: Tensor, columns_ND: Tensor, *, conditional: bool = True) -> Tensor:
        W_OI *= 1 + spoilt
        return group_scores(W_OI, inverse_II, columns_ND, conditional=conditional)

    monkeypatch.setattr(elimination, "group_scores", spoiling)
    how = solver(group_size=1)
    solve(by_hand(nn.Linear(6, 4), torch.eye(6) + 1), SHAPE, 3, LayerBudget(0, 4), how, measured=measured)
    messages = [record.getMessage() for record in caplog.records]
    assert [message[:24] for message in messages] == ["pruning down_proj costs "] * (warns and measured)
    assert all("raise dampening_frac or num_samples" in message for message in messages)


def test_bfloat16_weights_stay_bfloat16() -> None:
    model, plan, _ = prune(tiny_model("llama").to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert plan.layers[0].kept_channels == tuple(live_columns(family_of(model).down_proj(model.model.layers[0])))


def test_layers_are_told_as_they_finish() -> None:
    model, walk_state = tiny_model("llama"), MemoryWalkState()
    reported: list[tuple[int, int]] = []
    walk = walk_layers(ResidentDecoder(model), random_ids(model), CPU, walk_state=walk_state)
    prune_layerwise_(
        walk,
        shapes(model),
        4,
        BUDGETS,
        solver(),
        walk_state,
        on_layer=lambda layer: reported.append((layer, walk_state.layers_done)),
    )
    assert reported == [(0, 1), (1, 2), (2, 3)]


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
    plan = solve(sub_layers, shape, 2, LayerBudget(1, 0), solver("query_head")).plan
    assert [head // 2 for head in plan.kept_query_heads] == [0, 1]
    problem = prepared("o_proj", weight_OI, Hessian(torch.eye(8), 9), dampening_frac=0.01)
    scores = elimination.group_scores(problem.W_OI, problem.inverse_II, torch.arange(8).reshape(4, 2))
    expected = [int(scores[2 * group : 2 * group + 2].argmax()) + 2 * group for group in range(2)]
    assert list(plan.kept_query_heads) == expected


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
    plan = solve(sub_layers, shape, 2, LayerBudget(1, 0), solver(cholesky=cholesky)).plan
    assert plan.kept_kv_heads == (kept,)
