"""LLM-Pruner: coupled structures by first-order Taylor importance (arXiv 2305.11627), block-wise in the middle layers.

The first four and the last two layers are left whole. Its random and magnitude importances are the methods `random` and
`magnitude` with the same protected layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.bounds import Amount, Count, Seed
from pruning.methods._ranked import CurveOptions, OrderOptions, Ranked

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.ranking.job import RankingJob

VERSION = 1
#: what `order` reads
ORDERS_FROM = "calibration"


class OrderConfig(OrderOptions):
    """What the orders depend on."""

    importance: Literal["taylor", "l1", "l2", "random"] = "taylor"
    """|w dL/dw|, |w|, w², or a random order (section 3.2)."""
    level: Literal["element", "vector"] = "element"
    """Each weight counts by its absolute importance, or each row or column by that of its sum (section 3.2)."""
    aggregation: Literal["sum", "mean", "max", "prod", "first"] = "sum"
    """Over the linears of a coupled structure."""
    num_samples: Count | None = 10
    """Calibration windows that gradients are taken from (the authors: 10); null: all."""
    seed: Seed = 0
    """Of the random importance."""

    def token_streams(self, num_layers: int, num_samples: int, seq_len: int) -> int:
        """Gradients keep the inputs of every layer."""
        windows = min(num_samples, self.num_samples or num_samples)
        return (num_layers + 3) * windows * seq_len if self.importance == "taylor" else 0


class Config(CurveOptions, OrderConfig):
    """The options of LLM-Pruner; all of them enter the cache key."""

    protect_first: Amount = 4
    """Layers at the start that are left whole."""
    protect_last: Amount = 2
    """Layers at the end that are left whole."""
    head_rounding: Literal["carry", "down"] = "down"
    """The authors round heads down in each layer: of three kv groups a quarter is none."""


def rank(job: RankingJob, config: OrderConfig) -> None:
    """Score every coupled structure of the dense model."""
    import torch

    from pruning.ranking.coupled import rank_by_taylor, rank_layer, weights_of_layers

    if config.importance == "taylor":
        rank_by_taylor(job, config.num_samples, level=config.level, aggregation=config.aggregation)
        return
    generator = torch.Generator().manual_seed(config.seed)

    def importance(weight_OI: Tensor) -> Tensor:
        match config.importance:
            case "l1":
                return weight_OI.abs()
            case "l2":
                return weight_OI.square()
            case _:
                return torch.rand(weight_OI.shape, generator=generator, dtype=weight_OI.dtype)

    for layer, weights in weights_of_layers(job):
        importances = {role: importance(weight_OI) for role, weight_OI in weights.items()}
        rank_layer(job, layer, importances, level=config.level, aggregation=config.aggregation)


_method = Ranked(OrderConfig, rank)
needs_statistics, order_config, order = _method.needs_statistics, _method.order_config, _method.order
prune, check_model = _method.prune, _method.check_model
