"""FLAP: what fluctuates least around its mean goes first, and its mean stays as a bias (arXiv 2312.11983).

Scores are standardised in each layer, so that one threshold serves all (section 3.3). The biases are real ones, which
the checkpoint's config declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.methods._ranked import OrderOptions, Ranked, WidthOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pruning.families.forward import SubLayerKind
    from pruning.ranking.job import RankingJob
    from pruning.statistics.moments import Moments

VERSION = 1
#: what `order` reads
ORDERS_FROM = "calibration"


class OrderConfig(OrderOptions):
    """What the orders depend on."""

    metric: Literal["WIFV", "IFV"] = "WIFV"
    """Of an input column: var(x_j) ||W_:,j||², or var(x_j) alone (section 3.2)."""
    squared_heads: bool = True
    """Square the metric of o_proj's columns, as the released code does and the paper does not."""


class Config(WidthOptions, OrderConfig):
    """The options of FLAP; all of them enter the cache key."""

    structure: Literal["AL-AM", "AL-MM", "UL-UM", "UL-MM"] = "AL-AM"
    """AL: one threshold for all layers, UL: the same ratio in every layer. AM: the threshold shares the cut between
    attention and FFN too, MM: `split` does, UM: both lose the same ratio."""
    repair: Literal["bias", "none", "least_squares"] = "bias"  # type: ignore[assignment]  # one more than the others
    """bias: what the removed columns gave on average is added to the output (section 3.4)."""

    @property
    def measure(self) -> Literal["score", "per_parameter", "standardised"] | None:
        """The scores are standardised already, column by column."""
        return "score" if self.structure.startswith("AL") else None


def rank(job: RankingJob, config: OrderConfig) -> None:
    """Score every input column of the output linears on the dense model; a head scores the mean of its columns."""
    from pruning.ranking.inputs import column_energy, rank_by_inputs

    def fluctuation(kind: SubLayerKind, linear: nn.Linear, moments: Moments) -> Tensor:
        scores_I = moments.variance_I.double()
        if config.metric == "WIFV":
            scores_I = scores_I * column_energy(linear)
        if kind == "attention" and config.squared_heads:
            scores_I = scores_I.square()
        return (scores_I - scores_I.mean()) / scores_I.std()

    rank_by_inputs(job, fluctuation, mean=True, keep_means=True)


_method = Ranked(OrderConfig, rank)
needs_statistics, order_config, order = _method.needs_statistics, _method.order_config, _method.order
prune, check_model = _method.prune, _method.check_model
