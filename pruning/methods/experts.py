"""Experts: whole experts of a mixture go, and the router forgets them; by REAP's saliency (arXiv 2510.13999) or usage.

A token that would have gone to an expert that is no longer there goes to the next best; nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError
from pruning.methods._ranked import FORWARD_STREAMS, OrderOptions

if TYPE_CHECKING:
    from pruning.calibration import CalibrationSet
    from pruning.checkpoints.decoder import Decoder
    from pruning.families import LayerCost, ModelFamily
    from pruning.plan import LayerShape
    from pruning.walk.options import WalkOptions
    from pruning.walk.state import Pruned, WalkState

VERSION = 1
#: what `order` reads
ORDERS_FROM = "calibration"


class OrderConfig(OrderOptions):
    """What the orders depend on."""

    score: Literal["reap", "contribution", "frequency"] = "reap"
    """reap: mean over the tokens that an expert gets of router weight times norm of its output; contribution: the same,
    summed and over all tokens, so that frequency counts too; frequency: the share of tokens that it gets."""
    prior_tokens: Amount = 8
    """Of reap: so many tokens for which an expert gives nothing are counted in, since a mean of a few says little. An
    expert without any token is worth nothing by all three."""

    def token_streams(self, num_layers: int, num_samples: int, seq_len: int) -> int:
        """Of one walk forwards."""
        return FORWARD_STREAMS * num_samples * seq_len


class Config(OrderConfig):
    """The options of expert pruning; all of them enter the cache key."""

    sparsity: Real | None = Field(default=None, gt=0, lt=1)
    """Share of all decoder-layer parameters to remove, met as closely as whole experts can."""
    experts: Count | None = None
    """Number of experts that go from every layer (with allocation global: on average), in the place of sparsity."""
    allocation: Literal["uniform", "global"] = "uniform"
    """uniform: every layer loses the same number and is left as a stock class builds it; global: what is worth least,
    each layer's scores being over their mean."""
    protect_first: Amount = 0
    """Layers at the start that are left whole."""
    protect_last: Amount = 0
    """Layers at the end that are left whole."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.sparsity is None) == (self.experts is None):
            raise ValueError("give either sparsity or experts, the number of experts to remove from every layer")
        return self


def needs_statistics(config: Config) -> bool:
    """Never."""
    return False


def order_config(config: Config) -> OrderConfig:
    """What `order` is to be asked."""
    return OrderConfig.model_validate(config.model_dump(include=set(OrderConfig.model_fields)))


def order(
    decoder: Decoder,
    config: OrderConfig,
    folder: Path,
    *,
    calibration: CalibrationSet,
    options: WalkOptions,
    progress: Callable[[float, str], None] = lambda share, message: None,
    **_: Any,
) -> None:
    """Write the order in which the experts of each layer go into `folder`."""
    from pruning.orders import Orders
    from pruning.ranking.experts import rank_experts
    from pruning.ranking.job import RankingJob

    job = RankingJob(decoder, calibration, Orders(folder), options, None, progress)
    rank_experts(job, config.score, config.prior_tokens)


def prune(
    decoder: Decoder,
    calibration: CalibrationSet,
    config: Config,
    *,
    statistics: Path | None = None,
    orders: Path | None = None,
    options: WalkOptions,
    walk_state: WalkState,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> Pruned:
    """Drop experts; the layers are in walk_state, the decoder stays as it was.

    statistics: None, none are needed. orders: folder that `order` filled; None: it is made here. Raises PruningError
    for a model without experts, or if fewer may go than are asked for.
    """
    from pruning.families import layer_cost, shapes
    from pruning.layerwise.drop import drop_experts
    from pruning.ranking.experts import experts_names
    from pruning.ranking.job import orders_or_made

    if statistics is not None:
        raise PruningError("expert pruning takes no statistics: it looks at whole experts; leave them out")
    widths, cost = shapes(decoder.skeleton), layer_cost(decoder.skeleton)
    check_model(config, widths, cost, decoder.family)
    make = partial(
        order, decoder, order_config(config), calibration=calibration, options=options, progress=progress
    )  # fmt: skip
    with orders_or_made(orders, options.process_group, make) as made:
        found = {layer: made.load(name, "expert") for layer, name in experts_names(decoder.family, widths).items()}
    scores = {layer: dict(zip(each.order, each.scores, strict=True)) for layer, each in found.items()}
    gone = {
        layer: {expert: scores[layer][expert] for expert in found[layer].order[:count]}
        for layer, count in _counts(config, widths, cost, {layer: each.scores for layer, each in found.items()}).items()
    }
    return drop_experts(decoder, gone, options=options, walk_state=walk_state, progress=progress)


def check_model(config: Config, layers: Sequence[LayerShape], cost: LayerCost, family: ModelFamily) -> None:
    """Raise PruningError for a model without experts, or one of whose experts not so many may go: one of each layer
    always stays."""
    if family.experts is None:
        raise PruningError(
            f"a {family.name} model has no experts to remove: take a method that cuts heads and channels (slimgpt), or "
            "drops layers (shortened)"
        )
    free = _free(config, layers)
    if config.experts is not None:
        least = min((layers[layer].num_experts for layer in free), default=0)
        if config.experts >= least:
            raise PruningError(
                f"experts {config.experts}: of the layers that may lose some one has {least} experts, and one always "
                "stays; ask for fewer"
            )
        return
    assert config.sparsity is not None
    total = sum(map(cost.parameters, layers))
    sizes = {layer: _size(layers[layer], cost) for layer in free}
    most = sum(size * (layers[layer].num_experts - 1) for layer, size in sizes.items())
    if config.sparsity * total > most + min(sizes.values(), default=0) / 2:
        raise PruningError(
            f"sparsity {config.sparsity:g} cannot be reached by dropping experts: with one left of each layer at most "
            f"{most / total:.3f} of the decoder-layer parameters can go; lower sparsity, or protect fewer layers"
        )
    step = sum(sizes.values()) if config.allocation == "uniform" else min(sizes.values())
    if config.sparsity * total < step / 2:
        what = "one expert of every layer" if config.allocation == "uniform" else "one expert"
        raise PruningError(
            f"sparsity {config.sparsity:g} is less than half of {what}, which is {step / total:.3f} of the "
            "decoder-layer parameters; ask for more, set allocation to global, or prune channels instead"
        )


def _free(config: Config, layers: Sequence[LayerShape]) -> list[int]:
    """Layers whose experts may go."""
    inside = range(config.protect_first, len(layers) - config.protect_last)
    return [layer for layer in inside if layers[layer].num_experts > 1]


def _size(shape: LayerShape, cost: LayerCost) -> int:
    """Parameters that go with one expert."""
    return cost.per_channel * shape.intermediate_size + cost.per_expert


def _counts(
    config: Config, layers: Sequence[LayerShape], cost: LayerCost, scores: dict[int, Sequence[float]]
) -> dict[int, int]:
    """How many go from each layer. scores: of each layer in the order in which they go."""
    free = _free(config, layers)
    sizes = {layer: _size(layers[layer], cost) for layer in free}
    if config.allocation == "uniform":
        count = config.experts
        if count is None:
            assert config.sparsity is not None
            wanted = config.sparsity * sum(map(cost.parameters, layers))
            most = min(layers[layer].num_experts for layer in free) - 1
            count = min(range(1, most + 1), key=lambda each: abs(each * sum(sizes.values()) - wanted))
        return dict.fromkeys(free, count)
    wanted = (config.sparsity or 0) * sum(map(cost.parameters, layers))
    if config.experts is not None:
        wanted = config.experts * sum(sizes.values())
    candidates = sorted(
        (score * len(scores[layer]) / (sum(scores[layer]) or 1.0), layer)
        for layer in free
        for score in scores[layer][:-1]
    )
    counts, gone = dict.fromkeys(free, 0), 0
    for _, layer in candidates:
        if gone + sizes[layer] / 2 > wanted:
            break
        counts[layer] += 1
        gone += sizes[layer]
    return counts
