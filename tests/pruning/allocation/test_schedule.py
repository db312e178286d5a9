"""Budgets: the curves are the paper's and the parameters removed are the ones asked for, on the shapes people prune."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.allocation.budget import Allocation, HeadUnit, LayerBudget, num_head_units, removed_parameters
from pruning.allocation.curves import MAX_RATIO, Curve, curve_ratios, curve_weights
from pruning.allocation.schedule import solve_budgets
from pruning.errors import PruningError
from pruning.families import LayerCost, decoder_parameters, layer_cost, shapes
from pruning.plan import LayerShape
from tests.tiny import tiny_model

CURVES: tuple[Curve, ...] = ("log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease")


def model(layers: int, heads: int, kv_heads: int, ffn: int, hidden: int, head_dim: int = 0, norms: int = 0):
    """Layer shapes and costs of a Llama-shaped model without biases."""
    head_dim = head_dim or hidden // heads
    shape = LayerShape(num_heads=heads, num_kv_heads=kv_heads, intermediate_size=ffn)
    return (shape,) * layers, LayerCost(2 * head_dim * hidden, 2 * head_dim * hidden, 3 * hidden, 2 * hidden + norms)


MODELS = {
    "SmolLM2-135M": model(30, 9, 3, 1536, 576),
    "LLaMA-7B": model(32, 32, 32, 11008, 4096),
    "Llama-3-8B": model(32, 32, 8, 14336, 4096),
    "Mistral-7B": model(32, 32, 8, 14336, 4096, head_dim=128),
    "Qwen3-0.6B": model(28, 16, 8, 3072, 1024, head_dim=128, norms=256),
    "Qwen3-8B": model(36, 32, 8, 12288, 4096, head_dim=128, norms=256),
}


def achieved(
    budgets: tuple[LayerBudget, ...], source: tuple[LayerShape, ...], cost: LayerCost, unit: HeadUnit
) -> float:
    return removed_parameters(budgets, source, cost, unit) / sum(map(cost.parameters, source))


@pytest.mark.parametrize("layers", [2, 3, 32])
def test_curve_formulas(layers: int) -> None:
    first, last = 0.0625, 0.25
    log = [first + (last - first) * math.log(i + 1) / math.log(layers) for i in range(layers)]
    linear = [first + (last - first) * i / (layers - 1) for i in range(layers)]
    # at the scale of the paper's end points; a decreasing curve is the increasing one from the other end
    expected = {
        "log_increase": log,
        "linear_increase": linear,
        "uniform": [last] * layers,
        "log_decrease": log[::-1],
        "linear_decrease": linear[::-1],
    }
    for curve in CURVES:
        assert [last * weight for weight in curve_weights(curve, layers)] == pytest.approx(expected[curve])


@pytest.mark.parametrize("curve", CURVES)
def test_a_single_layer_has_the_whole_weight(curve: Curve) -> None:
    assert curve_weights(curve, 1) == (1.0,)


def test_start_over_end_one_is_uniform() -> None:
    assert curve_weights("log_increase", 5, 1.0) == pytest.approx((1.0,) * 5)


def test_end_points_of_the_paper_at_20_percent() -> None:
    source, cost = MODELS["LLaMA-7B"]
    budgets = solve_budgets(source, cost, Allocation(sparsity=0.2))
    # arXiv 2412.18110: r_0 = 0.0625 and r_31 = 0.25; ours are solved for exactly 20 % of the decoder-layer parameters
    assert budgets[0].channels / 11008 == pytest.approx(0.0625, abs=0.001)
    assert budgets[31].channels / 11008 == pytest.approx(0.25, abs=0.002)
    assert (budgets[0].head_units, budgets[31].head_units) == (2, 8)


@pytest.mark.parametrize("attention_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", MODELS)
def test_achieved_parameters_meet_the_asked_ones(name: str, curve: Curve, attention_ratio: float) -> None:
    source, cost = MODELS[name]
    units: tuple[HeadUnit, ...] = ("kv_group", "query_head")
    for sparsity, unit in product((0.2, 0.5) if curve != "log_increase" else (0.05, 0.2, 0.33, 0.5), units):
        allocation = Allocation(sparsity=sparsity, curve=curve, attention_ratio=attention_ratio, head_unit=unit)
        budgets = solve_budgets(source, cost, allocation)
        removed = removed_parameters(budgets, source, cost, unit)
        asked = sparsity * sum(map(cost.parameters, source))
        assert removed == pytest.approx(asked, rel=0.002)
        assert abs(removed - asked) <= cost.per_channel  # the channels are fine enough to make up for the heads
        assert all(0 <= b.head_units < num_head_units(s, unit) for b, s in zip(budgets, source, strict=True))
        assert all(0 <= b.channels <= s.intermediate_size for b, s in zip(budgets, source, strict=True))
        if attention_ratio == 0:
            assert not any(budget.head_units for budget in budgets)


@pytest.mark.parametrize(("name", "sparsity"), [("LLaMA-7B", 0.25), ("Llama-3-8B", 0.1), ("SmolLM2-135M", 0.15)])
def test_attention_alone_is_met_within_one_head_unit(name: str, sparsity: float) -> None:
    source, cost = MODELS[name]
    allocation = Allocation(sparsity=sparsity, curve="uniform", attention_ratio=math.inf)
    budgets = solve_budgets(source, cost, allocation)
    assert not any(budget.channels for budget in budgets)
    unit = cost.per_kv_head + source[0].num_groups * cost.per_query_head
    asked = sparsity * sum(map(cost.parameters, source))
    assert abs(removed_parameters(budgets, source, cost, "kv_group") - asked) <= unit


def test_attention_ratio_above_one_prunes_attention_more() -> None:
    source, cost = MODELS["LLaMA-7B"]
    budgets = solve_budgets(source, cost, Allocation(sparsity=0.2, curve="uniform", attention_ratio=2.0))
    heads = sum(budget.head_units for budget in budgets) / (32 * 32)
    channels = sum(budget.channels for budget in budgets) / (32 * 11008)
    assert heads == pytest.approx(2 * channels, rel=0.02)


@pytest.mark.parametrize(("first", "last"), [(4, 2), (0, 3), (31, 0)])
def test_protected_layers_lose_nothing(first: int, last: int) -> None:
    source, cost = MODELS["Llama-3-8B"]
    sparsity = 0.02
    budgets = solve_budgets(source, cost, Allocation(sparsity=sparsity, protect_first=first, protect_last=last))
    protected = [*budgets[:first], *budgets[len(budgets) - last :]]
    assert set(protected) == {LayerBudget(0, 0)}
    assert achieved(budgets, source, cost, "kv_group") == pytest.approx(sparsity, rel=0.002)


@pytest.mark.parametrize("count", [32, 40])
def test_protecting_every_layer_is_refused(count: int) -> None:
    source, cost = MODELS["LLaMA-7B"]
    with pytest.raises(PruningError, match=r"sparsity 0\.1 cannot be reached.*at most 0\.000"):
        solve_budgets(source, cost, Allocation(sparsity=0.1, protect_first=count))


@pytest.mark.parametrize(
    ("name", "allocation"),
    [
        ("LLaMA-7B", Allocation(sparsity=0.97)),
        ("LLaMA-7B", Allocation(sparsity=0.7, attention_ratio=0.0)),
        ("LLaMA-7B", Allocation(sparsity=0.4, attention_ratio=math.inf)),
        ("LLaMA-7B", Allocation(sparsity=0.5, protect_first=16, protect_last=4)),
        # one of three kv groups must stay, so attention can lose 2/3 of its quarter: 0.167
        ("SmolLM2-135M", Allocation(sparsity=0.2, attention_ratio=math.inf)),
        ("SmolLM2-135M", Allocation(sparsity=0.9)),
        ("Llama-3-8B", Allocation(sparsity=0.945)),
        ("Llama-3-8B", Allocation(sparsity=0.15, attention_ratio=math.inf, head_unit="query_head")),
    ],
)
def test_unreachable_sparsity_names_the_most_there_is(name: str, allocation: Allocation) -> None:
    source, cost = MODELS[name]
    with pytest.raises(
        PruningError, match=rf"sparsity {allocation.sparsity:g} cannot be reached.*lower sparsity"
    ) as error:
        solve_budgets(source, cost, allocation)
    most = float(str(error.value).split("at most ")[1].split(" ")[0])
    # and that much can indeed be reached, with the same split
    reachable = Allocation(**{**vars(allocation), "sparsity": most - 0.002})
    budgets = solve_budgets(source, cost, reachable)
    assert achieved(budgets, source, cost, allocation.head_unit) == pytest.approx(most - 0.002, abs=0.002)


def test_a_single_kv_head_leaves_attention_whole_and_the_channels_pay() -> None:
    source, cost = model(18, 8, 1, 16384, 2048, head_dim=256)
    budgets = solve_budgets(source, cost, Allocation(sparsity=0.5))
    assert not any(budget.head_units for budget in budgets)
    assert achieved(budgets, source, cost, "kv_group") == pytest.approx(0.5, rel=0.002)


def test_layers_of_unequal_widths() -> None:
    wide, narrow = (
        LayerShape(num_heads=32, num_kv_heads=8, intermediate_size=14336),
        LayerShape(num_heads=8, num_kv_heads=2, intermediate_size=1000),
    )
    _, cost = MODELS["Llama-3-8B"]
    source = (wide, narrow, narrow, wide)
    budgets = solve_budgets(source, cost, Allocation(sparsity=0.3, curve="uniform"))
    assert achieved(budgets, source, cost, "kv_group") == pytest.approx(0.3, rel=0.002)
    assert all(0.15 < b.channels / s.intermediate_size < 0.45 for b, s in zip(budgets, source, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_counts_are_those_of_the_real_model(family: str, unit: HeadUnit) -> None:
    real = tiny_model(family)
    source, cost = shapes(real), layer_cost(real)
    assert sum(map(cost.parameters, source)) == decoder_parameters(real)
    budgets = solve_budgets(source, cost, Allocation(sparsity=0.4, head_unit=unit))
    assert removed_parameters(budgets, source, cost, unit) == pytest.approx(
        0.4 * decoder_parameters(real), abs=cost.per_channel
    )


def test_given_end_points_of_the_paper_at_20_percent_on_llama_7b() -> None:
    # arXiv 2412.18110, section 3.4: log curve from 0.0625 to 0.25, the same ratio for heads and channels
    source, cost = MODELS["LLaMA-7B"]
    budgets = solve_budgets(source, cost, Allocation(sparsity=0.2, end_points=(0.0625, 0.25)))
    for i, budget in enumerate(budgets):
        ratio = 0.0625 + (0.25 - 0.0625) * math.log(i + 1) / math.log(32)
        assert budget == LayerBudget(head_units=round(32 * ratio), channels=round(11008 * ratio))
    assert (budgets[0], budgets[31]) == (LayerBudget(2, 688), LayerBudget(8, 2752))
    removed = sum(4 * 128 * 4096 * budget.head_units + 3 * 4096 * budget.channels for budget in budgets)
    total = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
    assert removed == removed_parameters(budgets, source, cost, "kv_group")
    # 20.064 % when every layer is rounded for itself: 0.064 % beside the paper's 20 %
    assert removed / total == pytest.approx(0.2006382, abs=1e-6)


def rising(curve: Curve, i: int, layers: int, first: float, last: float) -> float:
    """Section 3.4, written out for each curve apart."""
    return {
        "log_increase": first + (last - first) * math.log(i + 1) / math.log(layers),
        "linear_increase": first + (last - first) * i / (layers - 1),
        "uniform": first,
        "log_decrease": last + (first - last) * math.log(layers - i) / math.log(layers),
        "linear_decrease": last + (first - last) * (layers - 1 - i) / (layers - 1),
    }[curve]


@pytest.mark.parametrize("layers", [2, 3, 32])
@pytest.mark.parametrize(
    ("curve", "first", "last"),
    [
        ("log_increase", 0.1, 0.6),
        ("linear_increase", 0.0, 0.95),
        ("uniform", 0.3, 0.3),
        ("log_increase", 0.3, 0.3),
        ("log_decrease", 0.6, 0.1),
        ("linear_decrease", 0.95, 0.0),
    ],
)
def test_the_first_end_point_is_always_layer_0(curve: Curve, first: float, last: float, layers: int) -> None:
    ratios = curve_ratios(curve, layers, (first, last))
    assert ratios == pytest.approx([rising(curve, i, layers, first, last) for i in range(layers)])
    assert (ratios[0], ratios[-1]) == pytest.approx((first, last))


@pytest.mark.parametrize(("name", "unit"), [("LLaMA-7B", "kv_group"), ("Llama-3-8B", "query_head")])
@pytest.mark.parametrize("attention_ratio", [0.0, 0.5, 1.0, 2.0, math.inf])
@pytest.mark.parametrize("curve, end_points", [("log_increase", (0.05, 0.5)), ("linear_decrease", (0.5, 0.1))])
def test_given_ratios_are_taken_as_they_are(
    name: str, unit: HeadUnit, attention_ratio: float, curve: Curve, end_points: tuple[float, float]
) -> None:
    source, cost = MODELS[name]
    attention = min(1.0, attention_ratio)
    ffn = 1.0 if attention_ratio <= 1 else 0.0 if math.isinf(attention_ratio) else 1 / attention_ratio
    expected = []
    for i, shape in enumerate(source):
        ratio = 0.0 if i < 2 or i >= 31 else rising(curve, i, 32, *end_points)
        units = num_head_units(shape, unit)
        heads = min(round(ratio * attention * units), units - 1)
        expected.append(LayerBudget(heads, round(ratio * ffn * shape.intermediate_size)))
    share = removed_parameters(expected, source, cost, unit) / sum(map(cost.parameters, source))
    allocation = Allocation(share, curve, 0.9, attention_ratio, 2, 1, unit, end_points)
    assert solve_budgets(source, cost, allocation) == tuple(expected)


def test_one_head_unit_stays_whatever_the_end_points() -> None:
    source, cost = MODELS["SmolLM2-135M"]
    allocation = Allocation(sparsity=0.8797, curve="uniform", end_points=(0.95, 0.95))
    assert {budget.head_units for budget in solve_budgets(source, cost, allocation)} == {2}


@pytest.mark.parametrize(
    ("sparsity", "met"), [(0.1987, True), (0.2, True), (0.2026, True), (0.1985, False), (0.2027, False), (0.5, False)]
)
def test_end_points_must_meet_the_sparsity_within_0_2_percent(sparsity: float, met: bool) -> None:
    source, cost = MODELS["LLaMA-7B"]
    allocation = Allocation(sparsity=sparsity, end_points=(0.0625, 0.25))
    if met:
        assert achieved(solve_budgets(source, cost, allocation), source, cost, "kv_group") == pytest.approx(
            0.20064, abs=1e-5
        )
        return
    with pytest.raises(
        PruningError, match=r"remove 0\.2006 .*set sparsity to 0\.2006, or leave end_points out"
    ) as error:
        solve_budgets(source, cost, allocation)
    assert f"not sparsity {sparsity:g}" in str(error.value)
    told = float(str(error.value).split("set sparsity to ")[1].split(",")[0])
    solve_budgets(source, cost, Allocation(sparsity=told, end_points=(0.0625, 0.25)))


@pytest.mark.parametrize(
    ("curve", "end_points", "sentence"),
    [
        ("log_increase", (-0.01, 0.25), "are not ratios between 0 and 0.95"),
        ("log_increase", (0.1, MAX_RATIO + 0.01), "are not ratios between 0 and 0.95"),
        ("log_increase", (0.1, math.nan), "are not ratios between 0 and 0.95"),
        ("uniform", (0.1, 0.2), "differ, but a uniform curve has one ratio"),
        ("log_increase", (0.25, 0.0625), "does not lead from 0.25 to 0.0625; swap the end_points or take log_decrease"),
        ("linear_decrease", (0.1, 0.2), "does not lead from 0.1 to 0.2; swap the end_points or take linear_increase"),
    ],
)
def test_end_points_that_make_no_curve_are_refused(
    curve: Curve, end_points: tuple[float, float], sentence: str
) -> None:
    source, cost = MODELS["LLaMA-7B"]
    with pytest.raises(PruningError, match=sentence):
        solve_budgets(source, cost, Allocation(sparsity=0.2, curve=curve, end_points=end_points))


def test_a_single_layer_has_one_end_point() -> None:
    assert curve_ratios("log_increase", 1, (0.3, 0.3)) == (0.3,)
    with pytest.raises(PruningError, match="a model of one layer has one ratio; give it twice"):
        curve_ratios("log_increase", 1, (0.1, 0.3))


SHAPES = st.builds(
    lambda kv_heads, groups, ffn: LayerShape(num_heads=kv_heads * groups, num_kv_heads=kv_heads, intermediate_size=ffn),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 3000),
)


@settings(max_examples=150, deadline=None)
@given(
    source=st.lists(SHAPES, min_size=1, max_size=8),
    head_dim=st.integers(1, 64),
    hidden=st.integers(1, 512),
    allocation=st.builds(
        Allocation,
        sparsity=st.floats(0.001, 0.99),
        curve=st.sampled_from(CURVES),
        start_over_end=st.floats(0.01, 1.0),
        attention_ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.7, math.inf]),
        protect_first=st.integers(0, 3),
        protect_last=st.integers(0, 3),
        head_unit=st.sampled_from(["kv_group", "query_head"]),
    ),
)
def test_any_shapes_meet_the_sparsity_or_refuse(
    source: list[LayerShape], head_dim: int, hidden: int, allocation: Allocation
) -> None:
    cost = LayerCost(2 * head_dim * hidden, 2 * head_dim * hidden, 3 * hidden, 2 * hidden)
    try:
        budgets = solve_budgets(source, cost, allocation)
    except PruningError:
        return
    unit = allocation.head_unit
    for index, (budget, shape) in enumerate(zip(budgets, source, strict=True)):
        assert 0 <= budget.head_units <= max(0, num_head_units(shape, unit) - 1)
        assert 0 <= budget.channels <= shape.intermediate_size
        if index < allocation.protect_first or index >= len(source) - allocation.protect_last:
            assert budget == LayerBudget(0, 0)
    removed = removed_parameters(budgets, source, cost, unit)
    asked = allocation.sparsity * sum(map(cost.parameters, source))
    # within one channel; within one head unit where the channels cannot make up for whole heads
    one_unit = max(removed_parameters([LayerBudget(1, 0)], [shape], cost, unit) for shape in source)
    assert abs(removed - asked) <= max(one_unit, cost.per_channel)


def test_heads_rounded_down_in_each_layer_are_made_up_for_by_channels() -> None:
    """As LLM-Pruner rounds: of three kv groups a quarter is none, and five eighths are one."""
    shape = LayerShape(num_heads=9, num_kv_heads=3, intermediate_size=1536)
    cost = LayerCost(per_query_head=2 * 64 * 576, per_kv_head=2 * 64 * 576, per_channel=3 * 576, fixed=2 * 576)
    shapes = (shape,) * 30
    for sparsity, heads in ((0.2, 0), (0.5, 1)):
        allocation = Allocation(sparsity, curve="uniform", protect_first=4, protect_last=2, head_rounding="down")
        budgets = solve_budgets(shapes, cost, allocation)
        assert {budget.head_units for budget in budgets[4:28]} == {heads}
        removed = removed_parameters(budgets, shapes, cost, "kv_group")
        assert removed / (30 * cost.parameters(shape)) == pytest.approx(sparsity, abs=1e-4)
    with pytest.raises(PruningError, match=r"cannot be reached with heads rounded down .* set head_rounding to carry"):
        solve_budgets(shapes, cost, Allocation(0.16, curve="uniform", attention_ratio=math.inf, head_rounding="down"))
