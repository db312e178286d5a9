"""FLAP: what fluctuates least around its mean goes first, and its mean stays as a bias (arXiv 2312.11983).

Scores are standardised in each layer, so that one threshold serves all (section 3.3). The biases are real ones, which
the checkpoint's config declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from pruning.methods._ranked import FORWARD_STREAMS, OrderOptions, Ranked, WidthOptions

if TYPE_CHECKING:
    from torch import Tensor

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

    def token_streams(self, num_layers: int, num_samples: int, seq_len: int) -> int:
        """Of one walk forwards."""
        return FORWARD_STREAMS * num_samples * seq_len


class Config(WidthOptions, OrderConfig):
    """The options of FLAP; all of them enter the cache key."""

    structure: Literal["AL-AM", "AL-MM", "UL-UM", "UL-MM"] = "AL-AM"
    """AL: one threshold for all layers, UL: the same ratio in every layer. AM: the threshold shares the cut between
    attention and FFN too, UM: both lose the same ratio, MM: `split` says how."""
    repair: Literal["bias", "none", "least_squares"] = "bias"  # type: ignore[assignment]  # one more than the others
    """bias: what the removed columns gave on average is added to the output (section 3.4)."""

    @model_validator(mode="after")
    def _split_as_structured(self) -> Self:
        if self.structure.endswith("MM") and self.split is None:
            raise ValueError(f"structure {self.structure} shares the cut as split says; give split, e.g. equal or half")
        if not self.structure.endswith("MM") and self.split is not None:
            other = f"{self.structure[:3]}MM"
            raise ValueError(f"structure {self.structure} shares the cut by itself; leave split out, or take {other}")
        return self

    @property
    def measure(self) -> Literal["score", "per_parameter", "standardised"] | None:
        """The scores are standardised already, column by column."""
        return "score" if self.structure.startswith("AL") else None


def rank(job: RankingJob, config: OrderConfig) -> None:
    """Score every input column of the output linears on the dense model; a head scores the mean of its columns."""
    from pruning.ranking.inputs import column_energy, rank_by_inputs

    def fluctuation(kind: SubLayerKind, weight_OI: Tensor, moments: Moments) -> Tensor:
        scores_I = moments.variance_I.double()
        if config.metric == "WIFV":
            scores_I = scores_I * column_energy(weight_OI)
        if kind == "attention" and config.squared_heads:
            scores_I = scores_I.square()
        return (scores_I - scores_I.mean()) / scores_I.std()

    rank_by_inputs(job, fluctuation, mean=True, keep_means=True)


_method = Ranked(OrderConfig, rank)
needs_statistics, order_config, order = _method.needs_statistics, _method.order_config, _method.order
prune, check_model = _method.prune, _method.check_model
