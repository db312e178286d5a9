"""Magnitude: heads and channels whose coupled weights are small go first; no calibration token is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.methods._ranked import CurveOptions, OrderOptions, Ranked

if TYPE_CHECKING:
    from pruning.ranking.job import RankingJob

VERSION = 1
#: what `order` reads
ORDERS_FROM = "calibration"


class OrderConfig(OrderOptions):
    """What the orders depend on."""

    norm: Literal["l1", "l2"] = "l2"
    """Sum of |W| or of W² over the rows and columns that go together."""


class Config(CurveOptions, OrderConfig):
    """The options of magnitude pruning; all of them enter the cache key."""


def rank(job: RankingJob, config: OrderConfig) -> None:
    """Add up the coupled weights of every head and channel."""
    from pruning.ranking.coupled import rank_layer, weights_of_layers

    for layer, weights in weights_of_layers(job):
        power = 1 if config.norm == "l1" else 2
        rank_layer(job, layer, {role: weight_OI.abs() ** power for role, weight_OI in weights.items()})


_method = Ranked(OrderConfig, rank)
needs_statistics, order_config, order = _method.needs_statistics, _method.order_config, _method.order
prune, check_model = _method.prune, _method.check_model
