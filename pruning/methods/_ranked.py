"""What the methods share that rank heads and channels once, on the dense model: their options, and what follows a rank.

Such a method is a Config, made of OrderOptions (what its orders depend on) and of WidthOptions (what is done with
them), and one function that ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pruning.allocation.budget import Allocation
    from pruning.calibration import CalibrationSet
    from pruning.checkpoints.decoder import Decoder
    from pruning.families import LayerCost, ModelFamily
    from pruning.layerwise.apply import Application
    from pruning.plan import LayerShape
    from pruning.ranking.job import RankingJob
    from pruning.walk.options import WalkOptions
    from pruning.walk.state import Pruned, WalkState


class OrderOptions(BaseModel):
    """What the orders of a method depend on: one ranking serves every value of all other options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def token_streams(self, num_layers: int, num_samples: int, seq_len: int) -> int:
        """What a ranking keeps of activations at once, in values of the residual stream: tokens x streams."""
        return 0


#: streams before and after a sub-layer, and the inputs of its output linear, which are up to four times as wide
FORWARD_STREAMS = 6


class WidthOptions(BaseModel):
    """How much goes from where, and what happens to the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: Real = Field(gt=0, lt=1)
    """Share of all decoder-layer parameters to remove."""
    split: Literal["equal", "half", "third", "ffn", "attention"] | None = None
    """Attention against FFN: equal ratios, half or a third of the ratio for attention, or one of the two alone.
    Default: equal along a curve; with one threshold whatever scores least."""
    head_unit: Literal["kv_group", "query_head"] = "kv_group"
    """With grouped kv heads: whole kv groups, or the same number of query heads from every group."""
    protect_first: Amount = 0
    """Layers at the start that are left whole."""
    protect_last: Amount = 0
    """Layers at the end that are left whole."""
    channel_multiple: Count = Field(default=1, le=1024, exclude_if=lambda multiple: multiple == 1)
    """What stays of every FFN is a multiple of this, such as 64 or 128: odd widths lose the fast kernels. What one
    layer is rounded by the next ones make up for."""
    uniform: bool = Field(default=False, exclude_if=lambda uniform: not uniform)
    """Every layer keeps the same heads and channels, in numbers that transformers' own class builds: vLLM, SGLang, TGI
    and llama.cpp load what comes out. No curve then plays a part."""
    repair: Literal["none", "least_squares"] = "none"
    """least_squares: refit the columns that stay of each output linear from the dense model's Hessians."""
    dampening_frac: Real = Field(default=0.01, gt=0, le=1e6)
    """Of the least-squares repair: added to the diagonal of each Hessian, as a share of its mean."""

    @property
    def measure(self) -> Literal["score", "per_parameter", "standardised"] | None:
        """What one threshold is set on; None if a curve decides."""
        return None

    @property
    def over_depth(self) -> dict[str, Any]:
        """What the allocation needs to know of the curve."""
        return {"curve": "uniform"}

    def application(self) -> Application:
        """What is done with the orders."""
        from pruning.layerwise.apply import Application

        return Application(
            self.allocation_(), self.measure, self.split is None, self.repair, dampening_frac=self.dampening_frac
        )

    def allocation_(self) -> Allocation:
        """How much goes from where."""
        from pruning.allocation.budget import ATTENTION_RATIOS, Allocation

        return Allocation(
            sparsity=self.sparsity,
            attention_ratio=ATTENTION_RATIOS[self.split or "equal"],
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            head_unit=self.head_unit,
            channel_multiple=self.channel_multiple,
            uniform=self.uniform,
            **self.over_depth,
        )


class CurveOptions(WidthOptions):
    """WidthOptions with a choice between a curve over depth and one threshold for all layers."""

    allocation: Literal["curve", "global", "standardised"] = "curve"
    """curve: every layer loses the ratio that `curve` says; global: one threshold on the score per parameter;
    standardised: one threshold on scores less their site's mean and over its standard deviation."""
    curve: Literal["log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease"] = "uniform"
    """Of the ratios over depth (SlimGPT, section 3.4)."""
    start_over_end: Real = Field(default=0.25, gt=0, le=1)
    """First layer's ratio over the last one's, if the curve is not uniform."""
    head_rounding: Literal["carry", "down"] = "carry"
    """Along a curve, heads come in whole units: what one layer is rounded by the next ones make up for, or each is
    rounded down and its channels make up for it."""

    @property
    def measure(self) -> Literal["score", "per_parameter", "standardised"] | None:
        """By `allocation`."""
        return {"curve": None, "global": "per_parameter", "standardised": "standardised"}[self.allocation]

    @property
    def over_depth(self) -> dict[str, Any]:
        """By `curve`."""
        return {"curve": self.curve, "start_over_end": self.start_over_end, "head_rounding": self.head_rounding}


Rank = Callable[["RankingJob", Any], None]


@dataclass(frozen=True)
class Ranked:
    """The functions that a method module offers, for one that ranks by `rank` what its `order_class` says."""

    order_class: type[OrderOptions]
    rank: Rank

    def needs_statistics(self, config: WidthOptions) -> bool:
        """Whether `prune` wants a capture of the dense model's Hessians: for the least-squares repair."""
        return config.repair == "least_squares"

    def order_config(self, config: WidthOptions) -> OrderOptions:
        """What `order` is to be asked."""
        return self.order_class.model_validate(config.model_dump(include=set(self.order_class.model_fields)))

    def order(
        self,
        decoder: Decoder,
        config: OrderOptions,
        folder: Path,
        *,
        calibration: CalibrationSet,
        options: WalkOptions,
        work: Path | None = None,
        progress: Callable[[float, str], None] = lambda share, message: None,
        **_: Any,
    ) -> None:
        """Write the orders of all sites of the dense model into `folder`: one ranking serves every sparsity."""
        from pruning.orders import Orders
        from pruning.ranking.job import RankingJob

        self.rank(RankingJob(decoder, calibration, Orders(folder), options, work, progress), config)

    def prune(
        self,
        decoder: Decoder,
        calibration: CalibrationSet,
        config: WidthOptions,
        *,
        statistics: Path | None = None,
        orders: Path | None = None,
        options: WalkOptions,
        walk_state: WalkState,
        progress: Callable[[float, str], None] = lambda share, message: None,
    ) -> Pruned:
        """Prune; the weights are in walk_state, the decoder stays as it was.

        statistics: folder of a capture if `needs_statistics(config)`, else None. orders: folder that `order` filled;
        None: they are made here. Raises PruningError when statistics and config disagree or the sparsity cannot be
        reached.
        """
        from pruning.layerwise.apply import prune_by_orders
        from pruning.ranking.job import orders_or_made
        from pruning.statistics.hessian import Statistics

        if self.needs_statistics(config) != (statistics is not None):
            raise PruningError(
                f"repair {config.repair!r} and the statistics given ({statistics}) do not go together: least_squares "
                "needs the folder that capture_statistics wrote, and nothing else takes one"
            )
        self.check_model(config, *_model(decoder), decoder.family)
        make = partial(
            self.order, decoder, self.order_config(config), calibration=calibration, options=options, progress=progress
        )
        with orders_or_made(orders, options.process_group, make) as made:
            return prune_by_orders(
                decoder,
                made,
                config.application(),
                statistics=Statistics(statistics) if statistics else None,
                options=options,
                walk_state=walk_state,
                progress=progress,
            )

    def check_model(
        self, config: WidthOptions, layers: Sequence[LayerShape], cost: LayerCost, family: ModelFamily
    ) -> None:
        """Raise PruningError if a model of these layers cannot be pruned so."""
        from pruning.allocation.budget import check_head_unit
        from pruning.allocation.schedule import check_grid, check_reach

        check_head_unit(config.head_unit, layers)
        by_threshold = config.measure is not None
        check_reach(config.allocation_(), layers, cost, joint=by_threshold and config.split is None)
        check_grid(config.allocation_(), layers, cost, threshold=by_threshold)
        if config.uniform and str(config.repair) == "bias":
            raise PruningError(
                "uniform makes a model that stock classes load, which know no biases on output linears: set repair to "
                "none or least_squares, or leave uniform out"
            )


def _model(decoder: Decoder) -> tuple[Sequence[LayerShape], LayerCost]:
    from pruning.families import layer_cost, shapes

    return shapes(decoder.skeleton), layer_cost(decoder.skeleton)
