"""Depth pruning after Shortened LLaMA (arXiv 2402.02834): whole layers go, and the rest stays a stock model.

Scores are measured anew after each removal (SLEB, arXiv 2402.09025), which is much better from about a fifth of the
layers on, or once for all as in the paper. Its "+" variants are protect_first 4 and protect_last 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError

if TYPE_CHECKING:
    from pruning.calibration import CalibrationSet
    from pruning.checkpoints.decoder import Decoder
    from pruning.families import LayerCost, ModelFamily
    from pruning.families.forward import SubLayerKind
    from pruning.plan import LayerShape
    from pruning.walk.options import WalkOptions
    from pruning.walk.state import Pruned, WalkState

VERSION = 1
#: what `order` reads
ORDERS_FROM = "calibration"
#: share of the time that stand-ins take, the rest is reading and writing
_FITTING = 0.9


class OrderConfig(BaseModel):
    """What the order depends on: one serves every sparsity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    criterion: Literal["ppl", "taylor", "magnitude", "influence"] = "ppl"
    """Of a layer (section 3.1): the perplexity without it; sum of |w dL/dw|; sum of |w|; or block influence, one minus
    the cosine between its input and output (ShortGPT, arXiv 2403.03853)."""
    iterative: bool = True
    """Measure the scores anew after each removal; false: once, on the dense model. Magnitudes never change."""
    unit: Literal["layer", "sub_layer"] = "layer"
    """Whole layers, or attention and MLP apart."""
    num_samples: Count | None = 10
    """Calibration windows that scores are measured on (the paper: 10); null: all."""
    seq_len: Count | None = 128
    """Tokens of each (the paper: 128); null: as many as a window has."""
    protect_first: Amount = 0
    """Layers at the start that are left whole."""
    protect_last: Amount = 0
    """Layers at the end that are left whole."""

    def token_streams(self, num_layers: int, num_samples: int, seq_len: int) -> int:
        """What a ranking keeps of activations at once, in values of the residual stream: tokens x streams."""
        tokens = min(num_samples, self.num_samples or num_samples) * min(seq_len, self.seq_len or seq_len)
        blocks = num_layers if self.unit == "layer" else 2 * num_layers
        streams = {"ppl": blocks + 1, "taylor": num_layers + 3, "influence": 1, "magnitude": 0}
        return streams[self.criterion] * tokens


class Config(OrderConfig):
    """The options of depth pruning; all of them enter the cache key."""

    sparsity: Real | None = Field(default=None, gt=0, lt=1)
    """Share of all decoder-layer parameters to remove, met as closely as whole layers can."""
    layers: Count | None = None
    """Number of layers (or sub-layers) to remove, in the place of sparsity."""
    merge: Literal["none", "linear"] = "none"
    """linear: the down_proj before each run of dropped layers is fitted to stand in for them (ReplaceMe)."""
    ridge: Real = Field(default=0.01, gt=0, le=1e6)
    """Of that fit: weight of staying as it was, as a share of the mean diagonal of its inputs' second moments."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.sparsity is None) == (self.layers is None):
            raise ValueError("give either sparsity or layers, the number of layers to remove")
        if self.merge == "linear" and self.unit == "sub_layer":
            raise ValueError("merge 'linear' stands in for whole layers; set unit to layer, or merge to none")
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
    work: Path | None = None,
    progress: Callable[[float, str], None] = lambda share, message: None,
    **_: Any,
) -> None:
    """Write the order in which layers go into `folder`. work: a folder in which an interrupted ranking goes on."""
    from pruning.orders import Orders
    from pruning.ranking.depth import DepthRanking, rank_depth
    from pruning.ranking.job import RankingJob

    rank_depth(
        RankingJob(decoder, calibration, Orders(folder), options, work, progress),
        DepthRanking(
            config.criterion,
            config.iterative,
            config.unit,
            config.protect_first,
            config.protect_last,
            calibration.input_ids_NL[: config.num_samples, : config.seq_len],
        ),
    )


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
    """Drop layers; those that stay are in walk_state, the decoder stays as it was.

    statistics: None, none are needed. orders: folder that `order` filled; None: it is made here. Raises PruningError
    if fewer layers may go than are asked for.
    """
    from pruning.families import layer_cost, shapes
    from pruning.layerwise.drop import drop_blocks
    from pruning.layerwise.stand_ins import fit_stand_ins
    from pruning.ranking.job import orders_or_made

    if statistics is not None:
        raise PruningError("depth pruning takes no statistics: it looks at whole layers; leave them out")
    widths, cost = shapes(decoder.skeleton), layer_cost(decoder.skeleton)
    check_model(config, widths, cost, decoder.family)
    make = partial(
        order, decoder, order_config(config), calibration=calibration, options=options, progress=progress
    )  # fmt: skip
    with orders_or_made(orders, options.process_group, make) as made:
        found = made.load(decoder.family.layers_path, config.unit)
    dropped = _dropped(config, widths, cost, dict(zip(found.order, found.scores, strict=True)))
    if config.merge == "none":
        return drop_blocks(decoder, dropped, {}, options=options, walk_state=walk_state, progress=progress)
    stand_ins = fit_stand_ins(
        decoder, calibration, {layer for layer, _ in dropped}, config.ridge, options,
        progress=lambda share: progress(_FITTING * share, "fitting stand-ins"),
    )  # fmt: skip
    return drop_blocks(
        decoder, dropped, stand_ins, options=options, walk_state=walk_state,
        progress=lambda share, message: progress(_FITTING + (1 - _FITTING) * share, message),
    )  # fmt: skip


def check_model(config: Config, layers: Sequence[LayerShape], cost: LayerCost, family: ModelFamily) -> None:
    """Raise PruningError if a model of these layers cannot lose so many, less than half of the smallest block is asked
    for, a stand-in is asked of a down_proj with a norm behind it, or experts are to go without their attention."""
    from pruning.ranking.depth import most_removable, removable

    if config.merge == "linear" and family.mlp_output_norm_name is not None:
        raise PruningError(
            f"merge 'linear' fits a down_proj to what dropped layers would have added, and in a {family.name} model a "
            f"norm ({family.mlp_output_norm_name}) rescales whatever a down_proj gives: set merge to none"
        )
    if family.experts is not None and (config.unit == "sub_layer" or config.merge == "linear"):
        option = "unit sub_layer" if config.unit == "sub_layer" else "merge 'linear'"
        raise PruningError(
            f"{option} is about MLPs, and a {family.name} model has experts in their place: drop whole layers (unit "
            "layer, merge none)"
        )
    protected = config.protect_first, config.protect_last
    free = removable(len(layers), config.unit, *protected)
    most_blocks = most_removable(len(layers), config.unit, *protected)
    words = "layers" if config.unit == "layer" else "attentions and MLPs"
    where = f"{most_blocks} {words} may go (protect_first {protected[0]}, protect_last {protected[1]})"
    if config.layers is not None:
        if config.layers > most_blocks:
            raise PruningError(
                f"layers {config.layers}: of this model's {len(layers)} layers at most {where}; ask for fewer, or "
                "protect fewer"
            )
        return
    assert config.sparsity is not None
    sizes = sorted((block.parameters(layers[block.layer], cost) for block in free), reverse=True)[:most_blocks]
    total = sum(map(cost.parameters, layers))
    wanted, most, least = config.sparsity * total, sum(sizes), min(sizes, default=0)
    if wanted > most + least / 2:
        raise PruningError(
            f"sparsity {config.sparsity:g} cannot be reached by dropping {words}: {where}, {most / total:.3f} of the "
            "decoder-layer parameters; lower sparsity, or protect fewer"
        )
    if wanted < least / 2:
        raise PruningError(
            f"sparsity {config.sparsity:g} is less than half of the smallest of the {words}, which is "
            f"{least / total:.3f} of the decoder-layer parameters; ask for more, or prune heads and channels instead"
        )


def _dropped(
    config: Config, layers: Sequence[LayerShape], cost: LayerCost, scores: dict[int, float]
) -> dict[tuple[int, SubLayerKind], float]:
    """The sub-layers that go with their scores: as many blocks of the order as asked for, or as come nearest to the
    sparsity. scores: by block, in the order in which they go."""
    from pruning.ranking.depth import blocks_of

    blocks = blocks_of(len(layers), config.unit)
    count = config.layers
    if count is None:
        assert config.sparsity is not None
        wanted = config.sparsity * sum(map(cost.parameters, layers))
        sizes = [blocks[index].parameters(layers[blocks[index].layer], cost) for index in scores]
        gone = [abs(wanted - sum(sizes[:count])) for count in range(1, len(sizes) + 1)]
        count = 1 + gone.index(min(gone))
    going = [(blocks[index], score) for index, score in list(scores.items())[:count]]
    return {(block.layer, kind): score for block, score in going for kind in block.kinds}
