"""An order is nested; what it says of every level holds for scores and for rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pruning.orders import Order, Orders


def test_by_rising_score_and_equal_ones_by_index() -> None:
    order = Order.of_scores([0.5, 0.1, 0.5, 0.0])
    assert order.order == (3, 1, 0, 2)
    assert order.scores == pytest.approx((0.0, 0.1, 0.5, 0.5))
    assert order.errors[-1] == pytest.approx(1.1)
    assert Order.of_scores([0.5, 0.1, -0.2], order=[0, 2]).scores == pytest.approx((0.5, -0.2))


def test_groups_of_one_round_share_what_it_cost() -> None:
    order = Order(order=(4, 2, 0, 1), rounds=(1, 3, 4), errors=(1.0, 5.0, 8.0))
    assert order.scores == (1.0, 2.0, 2.0, 3.0)
    assert order.bounds(2) == (1.0, 5.0)
    assert order.bounds(3) == (5.0, 5.0)


def test_kept_on_disk(tmp_path: Path) -> None:
    orders, order = Orders(tmp_path), Order.of_scores([0.25, 0.125])
    orders.save("model.layers.0.mlp.down_proj", "channel", order)
    orders.save_mean("model.layers.0.mlp.down_proj", torch.arange(3.0))
    assert orders.load("model.layers.0.mlp.down_proj", "channel") == order
    assert torch.equal(orders.load_mean("model.layers.0.mlp.down_proj"), torch.arange(3.0))
