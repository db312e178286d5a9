"""One greedy order serves every sparsity: it is nested, its errors are true, and taking a part of it is pruning."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.layerwise.capture import capture_statistics
from pruning.methods import slimgpt
from pruning.obs import elimination, rounds
from pruning.orders import Orders
from pruning.statistics.hessian import Statistics
from pruning.walk.state import MemoryWalkState, Pruned
from tests.pruning.captured import CPU, outputs, windows
from tests.tiny import FAMILIES, tiny_model


class Case:
    """A tiny model, its capture and its orders."""

    def __init__(self, folder: Path, family: str = "llama", **config: object) -> None:
        self.model = tiny_model(family)
        self.decoder, self.calibration = ResidentDecoder(self.model), windows(self.model)
        self.captured, self.orders = folder / "captured", folder / "orders"
        self.captured.mkdir()
        self.orders.mkdir()
        capture_statistics(self.decoder, self.calibration, self.captured, CPU)
        self.config = {"propagate_error": False, "split": "equal", "dampening_frac": 0.05} | config
        asked = slimgpt.order_config(slimgpt.Config.model_validate({"sparsity": 0.5} | self.config))
        assert asked is not None
        slimgpt.order(self.decoder, asked, self.orders, statistics=self.captured, options=CPU)

    def prune(self, sparsity: float, *, ordered: bool) -> tuple[Pruned, MemoryWalkState]:
        walk_state = MemoryWalkState()
        pruned = slimgpt.prune(
            self.decoder,
            self.calibration,
            slimgpt.Config.model_validate({"sparsity": sparsity} | self.config),
            statistics=self.captured,
            orders=self.orders if ordered else None,
            options=CPU,
            walk_state=walk_state,
        )
        return pruned, walk_state


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sparsity_is_what_its_own_search_would_give(family: str, tmp_path: Path) -> None:
    # one channel a round: then the search knows no target, and both ways must agree to the last channel
    case = Case(tmp_path, family, group_size=1)
    for sparsity in (0.2, 0.33, 0.5):
        (shared, kept), (own, own_kept) = (case.prune(sparsity, ordered=ordered) for ordered in (True, False))
        assert shared.plan == own.plan
        for one, other in zip(shared.layers, own.layers, strict=True):
            assert one.predicted_error == pytest.approx(other.predicted_error, rel=1e-8)
            assert one.measured_error == pytest.approx(other.measured_error, rel=1e-4)
            assert one.condition == pytest.approx(other.condition)
        one, other = tiny_model(family), tiny_model(family)
        kept.apply_(one)
        own_kept.apply_(other)
        for name, linear in outputs(one).items():
            torch.testing.assert_close(linear.weight, outputs(other)[name].weight, atol=1e-6, rtol=1e-5)


def test_higher_sparsities_keep_less_of_the_same(tmp_path: Path) -> None:
    case = Case(tmp_path)
    plans = [case.prune(sparsity, ordered=True)[0].plan for sparsity in (0.2, 0.25, 0.33, 0.5)]
    for gentle, harsh in pairwise(plans):
        for one, other in zip(gentle.layers, harsh.layers, strict=True):
            assert set(other.kept_channels) <= set(one.kept_channels)
            assert set(other.kept_query_heads) <= set(one.kept_query_heads)


@pytest.mark.parametrize("group_size", [None, 5])
def test_the_errors_of_all_levels_are_those_of_the_best_weights(group_size: int | None, tmp_path: Path) -> None:
    case = Case(tmp_path, group_size=group_size)
    statistics = Statistics(case.captured)
    for name, linear in outputs(case.model).items():
        hessian, _ = statistics.load(name, CPU.device)
        system = elimination.dampen(name, linear.weight.detach(), hessian, dampening_frac=0.05)
        for unit in ("channel",) if name.endswith("down_proj") else ("kv_group", "query_head"):
            order = Orders(case.orders).load(name, unit)
            groups = linear.in_features if unit == "channel" else {"kv_group": 4, "query_head": 8}[unit]
            assert len(set(order.order)) == len(order.order) == order.rounds[-1]
            assert list(order.errors) == sorted(order.errors)
            wide = linear.in_features // groups
            for gone, error in zip(order.rounds, order.errors, strict=True):
                left = [c for c in range(linear.in_features) if c // wide not in order.order[:gone]]
                best_OI = torch.zeros_like(system.W_OI)
                best_OI[:, left] = elimination.refit(system, torch.tensor(left))
                assert elimination.output_error(system.W_OI, best_OI, system.dampened()) == pytest.approx(
                    error, rel=1e-7
                )


def test_the_order_reaches_as_far_as_any_budget(tmp_path: Path) -> None:
    case = Case(tmp_path)
    pruned, _ = case.prune(0.83, ordered=True)  # nearly all that can go
    assert pruned.achieved_sparsity == pytest.approx(0.83, abs=0.01)


def test_nested_sizes_never_look_at_the_target() -> None:
    sizes = list(rounds.nested_group_sizes(1400, 1536))
    assert sum(sizes) == 1400
    assert sizes[0] == 96
    shorter = list(rounds.nested_group_sizes(700, 1536))
    assert shorter[:-1] == sizes[: len(shorter) - 1]


def test_errors_that_propagate_have_no_common_order() -> None:
    assert slimgpt.order_config(slimgpt.Config(sparsity=0.2)) is None
