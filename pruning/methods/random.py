"""Random: heads and channels go in random order; what a method is worth shows beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning.bounds import Seed
from pruning.methods._ranked import CurveOptions, OrderOptions, Ranked

if TYPE_CHECKING:
    from pruning.ranking.job import RankingJob

VERSION = 1
#: what `order` reads
ORDERS_FROM = "calibration"


class OrderConfig(OrderOptions):
    """What the orders depend on."""

    seed: Seed = 0
    """Of the order."""


class Config(CurveOptions, OrderConfig):
    """The options of random pruning; all of them enter the cache key."""


def rank(job: RankingJob, config: OrderConfig) -> None:
    """Draw an order for every site."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    for layer, shape in enumerate(job.shapes):
        query_H = torch.rand(shape.num_heads, generator=generator)
        group_K = torch.rand(shape.num_kv_heads, generator=generator)
        job.save_heads(layer, query_H, group_K)
        for expert in range(shape.num_experts) if shape.num_experts else (None,):
            job.save_channels(layer, torch.rand(shape.intermediate_size, generator=generator), expert)
        job.layer_done(layer)


_method = Ranked(OrderConfig, rank)
needs_statistics, order_config, order = _method.needs_statistics, _method.order_config, _method.order
prune, check_model = _method.prune, _method.check_model
