"""Hard-concrete gates against sampling, their Lagrangian by hand and on a tiny model, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.families import decoder_parameters, layer_cost
from pruning.gradual import gates as module
from pruning.gradual.gates import OPEN, Gates, open_probability, sampled, settled
from pruning.gradual.masks import fold_, masking
from pruning.gradual.prunable import Prunable
from pruning.methods import compresso
from pruning.recovery import RecoveryInputs
from pruning.training.options import TrainingRun
from tests.pruning.captured import RECORDS, TRAINING, logits
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

SPREAD = torch.linspace(-5, 5, 21, dtype=torch.float64)


def gates(family: str = "llama", num_steps: int = 10, **options: Any) -> tuple[Any, Prunable, Gates]:
    model = tiny_model(family)
    config = compresso.Config(sparsity=0.3, **options)
    prunable = Prunable.of(model, config.allocation_(), config.measure, joint=config.joint)
    return model, prunable, compresso._make(config)(prunable, model, num_steps, torch.device("cpu"))


def test_expected_l0_is_what_sampling_gives() -> None:
    uniform = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = sampled(SPREAD, uniform)
    assert (drawn >= 0).all()
    assert (drawn <= 1).all()
    torch.testing.assert_close((drawn > 0).double().mean(0), open_probability(SPREAD), atol=0.006, rtol=0)
    assert (drawn == 1).any(0).sum() > 15, "gates can be wholly open"


def test_the_settled_gate_is_the_middle_of_the_drawn_ones() -> None:
    uniform = torch.rand(40_001, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    open_or_shut = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
    assert sampled(open_or_shut, uniform).median(0).values.tolist() == pytest.approx([0, 0.5, 1], abs=0.01)
    assert settled(open_or_shut).tolist() == pytest.approx([0, 0.5, 1])
    assert settled(torch.tensor([OPEN])).item() == 1, "training begins with the model as it is"
    assert open_probability(torch.tensor([OPEN])).item() == pytest.approx(0.98, abs=0.005)


def test_gates_have_gradients_where_they_are_neither_open_nor_shut() -> None:
    log_alpha = SPREAD.clone().requires_grad_()
    values = sampled(log_alpha, torch.full_like(SPREAD, 0.5))
    values.sum().backward()
    assert log_alpha.grad is not None
    inside = (values > 0) & (values < 1)
    assert inside.any()
    assert torch.equal(log_alpha.grad > 0, inside)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("head_unit", ["kv_group", "query_head"])
def test_expected_sparsity_counts_parameters(family: str, head_unit: str) -> None:
    if family == "opt" and head_unit == "query_head":
        pytest.skip("it has no groups")
    model, prunable, made = gates(family, head_unit=head_unit)
    with torch.no_grad():
        made.log_alpha_N.fill_(-100.0)
    cost = layer_cost(model)
    expected = 0
    for shape in prunable.widths:
        expected += cost.per_query_head * shape.num_heads + cost.per_channel * shape.intermediate_size
        expected += cost.per_kv_head * shape.num_kv_heads if head_unit == "kv_group" else 0
    assert made.expected_sparsity().item() == pytest.approx(expected / decoder_parameters(model), rel=1e-5)
    with torch.no_grad():
        made.log_alpha_N.fill_(100.0)
    assert made.expected_sparsity().item() == pytest.approx(0, abs=1e-6)


def test_the_lagrangian_step_by_hand() -> None:
    options = {"gate_learning_rate": 0.05, "multiplier_learning_rate": 0.5, "penalty": 7.0, "target_warmup": 0.5}
    _, _, made = gates(**options)
    made.multipliers = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    log_alpha = made.log_alpha_N.detach().double().requires_grad_()
    shares = made._shares_N.double()
    distance = ((1 - open_probability(log_alpha)) * shares).sum() - 0.3 * 2 / 5
    (-2.0 * distance + (1.0 + 7.0) * distance**2).backward()
    noise = torch.linspace(-1e-4, 1e-4, len(log_alpha))
    made.log_alpha_N.grad = noise.clone()  # the loss's own, as the backward passes leave it
    assert log_alpha.grad is not None
    grad = log_alpha.grad + noise
    made.before_step(2)
    # Adam's first step is the sign
    torch.testing.assert_close(
        made.log_alpha_N.detach().double(), log_alpha.detach() - 0.05 * grad.sign(), atol=1e-3, rtol=0
    )
    now = float(distance.detach())
    assert made.multipliers.tolist() == pytest.approx([-2.0 + 0.5 * now, 1.0 + 0.5 * now**2], rel=1e-5)
    assert made.log_alpha_N.grad is None
    assert [made.target(step) for step in (1, 5, 10)] == pytest.approx([0.06, 0.3, 0.3])


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_folding_is_what_the_settled_gates_do(family: str) -> None:
    model, prunable, made = gates(family)
    with torch.no_grad():
        made.log_alpha_N.copy_(torch.linspace(-3, 3, len(made.log_alpha_N)).roll(40))
    made.draw(noise=False)
    ids = random_ids(model)
    with masking(model, prunable.sites, made.factors):
        gated = logits(model, ids)
    assert (gated - logits(model, ids)).abs().max() > 0.1
    fold_(model, prunable.sites, made.factors())
    torch.testing.assert_close(logits(model, ids), gated, atol=1e-5, rtol=1e-5)


def test_gates_below_the_threshold_go_and_the_others_are_folded() -> None:
    _, prunable, made = gates()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        made.log_alpha_N.copy_(torch.randn(len(made.log_alpha_N), generator=generator) * 2)
    choice, factors = made.outcome()
    kept, gone = [], []
    for site, values in zip(prunable.sites, made.log_alpha_N.detach().split(made._counts), strict=True):
        mask = choice.mask(site).bool()
        kept += values[mask].tolist()
        gone += values[~mask].tolist()
        torch.testing.assert_close(factors[site.name], settled(values) * mask)
    assert max(gone) < min(kept)
    assert abs(choice.sparsity - 0.3) < max(map(prunable.share_of, prunable.sites)) / 2 + 1e-6


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    _, _, one = gates()
    _, _, other = gates()

    def steps(of: Gates, first: int) -> None:
        for step in range(first, first + 3):
            of.log_alpha_N.grad = torch.sin(torch.arange(len(of.log_alpha_N)) * step) * 0.01
            of.before_step(step)

    steps(one, 1)
    other.load_({name: tensor.detach().clone() for name, tensor in one.state().items()})
    steps(one, 4)
    steps(other, 4)
    assert torch.equal(one.log_alpha_N, other.log_alpha_N)
    assert torch.equal(one.multipliers, other.multipliers)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sparsity"), [("llama", 0.35), pytest.param("opt", 0.6, marks=pytest.mark.long)])
def test_expected_sparsity_reaches_its_target(
    family: str, sparsity: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Gates] = []

    class Kept(Gates):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(module, "Gates", Kept)
    config = compresso.Config(sparsity=sparsity, **{**TRAINING, "max_steps": 120})
    model = tiny_model(family)
    inputs = RecoveryInputs(records=RECORDS)
    pruned = compresso.train(model, tiny_tokenizer(), inputs, config, TrainingRun(tmp_path))
    assert pruned.expected_sparsity == pytest.approx(sparsity, abs=0.02)
    assert pruned.expected_sparsity == pytest.approx(made[0].figures()["expected_sparsity"])
    assert [step for step, _ in pruned.curves["expected_sparsity"]] == list(range(1, 121))
    assert pruned.curves["multiplier"][-1][1] < 0, "the loss alone would keep all gates open"
    # what is removed by count is then what the gates themselves say
    shut = torch.cat([settled(each.detach()) == 0 for each in made[0].log_alpha_N.split(made[0]._counts)])
    assert float((shut * made[0]._shares_N).sum()) == pytest.approx(pruned.achieved_sparsity, abs=0.1)
