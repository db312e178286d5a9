"""Wanda-sp: Wanda's score (arXiv 2306.11695) on whole heads and channels, as FLAP (arXiv 2312.11983) compares with it.

A column of an output linear scores ||W_:,j||² E[x_j²], a head the sum of its columns; nothing is repaired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning.methods._ranked import FORWARD_STREAMS, CurveOptions, OrderOptions, Ranked

if TYPE_CHECKING:
    from pruning.ranking.job import RankingJob

VERSION = 1
#: what `order` reads
ORDERS_FROM = "calibration"


class OrderConfig(OrderOptions):
    """What the orders depend on: nothing but model and calibration."""

    def token_streams(self, num_layers: int, num_samples: int, seq_len: int) -> int:
        """Of one walk forwards."""
        return FORWARD_STREAMS * num_samples * seq_len


class Config(CurveOptions, OrderConfig):
    """The options of Wanda-sp; all of them enter the cache key."""


def rank(job: RankingJob, config: OrderConfig) -> None:
    """Score every input column of the output linears on the dense model."""
    from pruning.ranking.inputs import column_energy, rank_by_inputs

    rank_by_inputs(job, lambda kind, weight_OI, moments: column_energy(weight_OI) * moments.square_I)


_method = Ranked(OrderConfig, rank)
needs_statistics, order_config, order = _method.needs_statistics, _method.order_config, _method.order
prune, check_model = _method.prune, _method.check_model
