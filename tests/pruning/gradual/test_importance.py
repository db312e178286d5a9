"""LoRAPrune's importance against gradients of the merged weight; its average, schedule and masks by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruning.families import family_of
from pruning.families.sites import sites_of
from pruning.gradual import importance as module
from pruning.gradual.importance import LoraImportance, coupled, estimated_gradient, importance, rising_ratio
from pruning.methods import loraprune
from pruning.plan import LayerShape
from pruning.recovery import RecoveryInputs
from pruning.training.adapters import LowRank, low_rank, merged_adapters
from pruning.training.options import TrainingRun
from tests.pruning.captured import RECORDS, TRAINING, logits
from tests.tiny import random_ids, tiny_model, tiny_tokenizer


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(
    scaling: float, rank: int = 2, seed: int = 0
) -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    a, b = nn.Parameter(random(rank, 6, seed=seed)), nn.Parameter(random(5, rank, seed=seed + 1))
    weight, inputs, wanted = random(5, 6, seed=seed + 2), random(20, 6, seed=seed + 3), random(20, 5, seed=seed + 4)
    return a, b, weight, inputs, lambda merged: (inputs @ merged.T - wanted).square().mean()


def test_it_is_the_change_of_the_product_under_a_step_of_one() -> None:
    a, b, weight, _, loss = adapter(scaling=2.0)
    loss(weight + 2.0 * b @ a).backward()
    assert a.grad is not None
    assert b.grad is not None
    found = estimated_gradient(a, b, a.grad, b.grad)
    torch.testing.assert_close(found, b @ a - (b - b.grad) @ (a - a.grad))


def test_it_agrees_with_the_true_gradient_where_the_adapter_spans_all_inputs() -> None:
    """With B = 0 and A orthogonal the gradient of A is 0, and that of B is s G A^T: times A it is s G."""
    scaling = 3.0
    _, _, weight, _, loss = adapter(scaling)
    a = nn.Parameter(torch.linalg.qr(random(6, 6, seed=9)).Q)
    b = nn.Parameter(torch.zeros(5, 6, dtype=torch.float64))
    merged = (weight + scaling * b @ a).detach().requires_grad_()
    loss(merged).backward()
    loss(weight + scaling * b @ a).backward()
    assert merged.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(estimated_gradient(a, b, a.grad, b.grad), scaling * merged.grad)
    found = importance(LowRank(weight, a, b, scaling)).double()
    torch.testing.assert_close(found, (scaling * merged.grad * merged).square(), rtol=1e-4, atol=1e-6)


def test_weights_count_with_what_the_adapter_adds() -> None:
    a, b, weight, _, loss = adapter(scaling=0.5, seed=20)
    loss(weight + 0.5 * b @ a).backward()
    assert a.grad is not None
    assert b.grad is not None
    expected = (estimated_gradient(a, b, a.grad, b.grad) * (weight + 0.5 * b @ a)).square()
    torch.testing.assert_close(importance(LowRank(weight, a, b, 0.5)).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head_unit", ["kv_group", "query_head"])
def test_all_weights_of_a_group_are_added_up(head_unit: Any) -> None:
    shape, head_dim, hidden = LayerShape(num_heads=4, num_kv_heads=2, intermediate_size=3), 2, 5
    sizes = {"q": (8, hidden), "k": (4, hidden), "v": (4, hidden), "o": (hidden, 8)}
    sizes |= {"gate": (3, hidden), "up": (3, hidden), "down": (hidden, 3)}
    parts = {role: random(*size, seed=number) for number, (role, size) in enumerate(sizes.items())}
    attention, mlp = sites_of(family_of(tiny_model("llama")), 0, shape, head_dim, head_unit)
    for group in range(attention.num_groups):
        columns = attention.columns_ND[group]
        expected = parts["q"][columns].sum() + parts["o"][:, columns].sum()
        if head_unit == "kv_group":
            rows = slice(head_dim * group, head_dim * (group + 1))
            expected = expected + parts["k"][rows].sum() + parts["v"][rows].sum()
        assert coupled(attention, parts)[group].item() == pytest.approx(expected.item())
    for channel in range(3):
        expected = parts["gate"][channel].sum() + parts["up"][channel].sum() + parts["down"][:, channel].sum()
        assert coupled(mlp, parts)[channel].item() == pytest.approx(expected.item())
    only_v = {"v": parts["v"]}
    if head_unit == "kv_group":
        assert coupled(attention, only_v).tolist() == pytest.approx(parts["v"].reshape(2, -1).sum(1).tolist())


def test_the_ratio_rises_as_a_cubic_between_the_warm_ups() -> None:
    ratios = [rising_ratio(step / 20, 0.1, 0.9) for step in range(21)]
    assert ratios[:3] == [0, 0, 0]
    assert ratios[18:] == [1, 1, 1]
    assert ratios[10] == pytest.approx(1 - (1 - 0.5) ** 3)
    assert ratios == sorted(ratios)
    assert ratios[4] - ratios[3] > ratios[17] - ratios[16] > 0
    assert rising_ratio(1.0, 0.0, 1.0) == 1


class _Watched(LoraImportance):
    """Computes its averages a second time, from gradients of every optimizer step in float64."""

    seen: list[_Watched] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.by_hand: dict[str, Tensor] = {}
        self.masked: list[float] = []
        self.seen.append(self)

    def before_step(self, step: int) -> None:
        for site in self._prunable.sites:
            parts: dict[str, Tensor] = {}
            for role, rows in self._rows[site.name].items():
                found: Any = low_rank(rows.linear)
                a, b, grad_a, grad_b = (
                    each.detach().double() for each in (found.a_RI, found.b_OR, found.a_RI.grad, found.b_OR.grad)
                )
                change = grad_b @ a + b @ grad_a - grad_b @ grad_a
                parts[role] = rows.rows_of((change * (found.weight_OI.double() + found.scaling * b @ a)) ** 2)
            before = self.by_hand.get(site.name, torch.zeros(site.num_groups, dtype=torch.float64))
            self.by_hand[site.name] = 0.9 * before + 0.1 * coupled(site, parts)
        super().before_step(step)
        self.masked.append(self.figures()["sparsity"])


@pytest.mark.parametrize(("accumulated", "family"), [(1, "qwen2"), (4, "qwen2"), (4, "phi3")])
def test_a_moving_average_of_whole_optimizer_steps_decides(
    accumulated: int, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Watched.seen.clear()
    monkeypatch.setattr(module, "LoraImportance", _Watched)
    options = {**TRAINING, "micro_batch_size": 4 // accumulated, "max_steps": 5, "dropout": 0.0}
    config = loraprune.Config(sparsity=0.3, **options)
    model = tiny_model(family)
    pruned = loraprune.train(model, tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, TrainingRun(tmp_path))
    (watched,) = _Watched.seen
    for name, average in watched.average.items():
        torch.testing.assert_close(average, watched.by_hand[name], rtol=1e-3, atol=0)
    assert watched.masked == [value for _, value in pruned.curves["sparsity"]]
    assert watched.masked == sorted(watched.masked)
    assert watched.masked[-1] == pruned.achieved_sparsity
    for site in watched._prunable.sites:
        kept = pruned.plan.layers[site.layer]
        if site.kind == "mlp":
            worth = watched.average[site.name]
            gone = [channel for channel in range(site.num_groups) if channel not in kept.kept_channels]
            assert worth[gone].max() <= worth[list(kept.kept_channels)].min()


def test_the_gradients_do_not_depend_on_how_a_batch_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Watched.seen.clear()
    monkeypatch.setattr(module, "LoraImportance", _Watched)
    for micro in (1, 4):
        config = loraprune.Config(sparsity=0.3, **{**TRAINING, "micro_batch_size": micro, "max_steps": 1, "dropout": 0})
        run = TrainingRun(tmp_path / str(micro))
        loraprune.train(tiny_model("llama"), tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, run)
    one, other = _Watched.seen
    for name, average in one.average.items():
        torch.testing.assert_close(average, other.average[name], rtol=1e-3, atol=0)


def test_masked_groups_give_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model under hooks, adapters beside it, computes what the merged and folded one does."""
    under_hooks: list[Tensor] = []

    class Kept(LoraImportance):
        def outcome(self) -> Any:
            choice, factors = super().outcome()
            assert all(torch.equal(factors[name], self.factors()[name]) for name in factors)
            return choice, factors

        def before_step(self, step: int) -> None:
            super().before_step(step)
            if step == 3:
                training = model.training
                with torch.no_grad():
                    under_hooks.append(model.eval()(ids).logits)
                model.train(training)

    monkeypatch.setattr(module, "LoraImportance", Kept)
    model = tiny_model("llama")
    ids, dense = random_ids(model), copy.deepcopy(model)
    # so slow that the last step, taken after the look, changes nothing
    config = loraprune.Config(sparsity=0.4, **{**TRAINING, "learning_rate": 1e-12})
    loraprune.train(model, tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, TrainingRun(tmp_path))
    assert (under_hooks[0] - logits(dense, ids)).abs().max() > 0.1
    torch.testing.assert_close(logits(model, ids), under_hooks[0], atol=1e-5, rtol=1e-5)


def test_low_rank_finds_adapters_and_nothing_else() -> None:
    model = tiny_model("llama")
    config = loraprune.Config(sparsity=0.3, targets=("v", "down"), rank=3)
    layer = model.model.layers[0]
    with merged_adapters(model, config):
        found: Mapping[str, LowRank | None] = {
            role: low_rank(linear) for role, linear in family_of(model).linears(layer).items()
        }
        assert {role for role, each in found.items() if each} == {"v", "down"}
        assert found["v"] is not None
        assert (found["v"].a_RI.shape, found["v"].b_OR.shape, found["v"].scaling) == ((3, 32), (16, 3), 16 / 3)
    assert low_rank(layer.self_attn.v_proj) is None
