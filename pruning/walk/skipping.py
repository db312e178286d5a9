"""What layers are worth as a whole: the loss without each of them, and how much each changes its input.

Shapes: N samples, B samples of one batch, L tokens per sample, C residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruning.activations.activations import Activations
from pruning.families.forward import KINDS, SubLayerKind
from pruning.walk.streams import ResidualStreams

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.families import LayerCost
    from pruning.plan import LayerShape
    from pruning.walk.options import WalkOptions


@dataclass(frozen=True, order=True)
class Block:
    """What depth pruning removes at once: a whole layer, or one sub-layer of it."""

    layer: int
    kinds: tuple[SubLayerKind, ...] = KINDS

    def parameters(self, shape: LayerShape, cost: LayerCost) -> int:
        """What goes with it: all of a layer, or a sub-layer without its norm, which stays."""
        if self.kinds == KINDS:
            return cost.parameters(shape)
        attention = cost.per_query_head * shape.num_heads + cost.per_kv_head * shape.num_kv_heads
        return attention if self.kinds == ("attention",) else cost.per_channel * shape.num_channels


class SubLayers:
    """Which sub-layers of a decoder are still there."""

    def __init__(self, removed: Collection[Block] = ()) -> None:
        self._removed = {(block.layer, kind) for block in removed for kind in block.kinds}

    def __call__(self, layer: int) -> tuple[SubLayerKind, ...]:
        """Those of one layer, none if it is gone as a whole."""
        return tuple(kind for kind in KINDS if (layer, kind) not in self._removed)


@torch.no_grad()
def losses_without(
    decoder: Decoder,
    input_ids_NL: Tensor,
    options: WalkOptions,
    blocks: Sequence[Block],
    present: SubLayers,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[Block, float]:
    """Mean next-token loss (nats) over the samples of all processes without each of `blocks`, the others being there.

    Each layer is loaded once. The stream without a block is the common one before it, which is not computed again: n
    layers in turn cost (n + 1) / 2 forwards in all. In memory, or beyond the budget in files: one stream per block.
    """
    ids_NL, group = options.process_group.share(input_ids_NL), options.process_group
    with options.walk_store(decoder, ids_NL.shape[1]) as store:
        walk = ResidualStreams(decoder, options, store, ids_NL)
        without: dict[Block, Activations] = {}
        for index in range(decoder.num_layers):
            kinds = present(index)
            new = [block for block in blocks if block.layer == index]
            if kinds:
                layer = decoder.layer(index, options.device)
                for stream in without.values():
                    walk.advance(stream, layer, index, kinds, into=stream)
                for block in new:
                    rest = tuple(kind for kind in kinds if kind not in block.kinds)
                    without[block] = walk.advance(walk.common, layer, index, rest, into=walk.allocate())
                walk.advance(walk.common, layer, index, kinds, into=walk.common)
                del layer  # before the next one is there
            progress((index + 1) / decoder.num_layers)
        losses = [walk.summed_loss(without[block]) for block in blocks]
    sums = group.sum_of(*losses, len(ids_NL) * (ids_NL.shape[1] - 1))
    return {block: loss / sums[-1] for block, loss in zip(blocks, sums[:-1], strict=True)}


@torch.no_grad()
def influences(
    decoder: Decoder,
    input_ids_NL: Tensor,
    options: WalkOptions,
    blocks: Sequence[Block],
    present: SubLayers,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[Block, float]:
    """Block influence of each: 1 - mean cosine between the residual stream before it and after it (ShortGPT, arXiv
    2403.03853, equation 1), the blocks of `present` being there."""
    ids_NL, group = options.process_group.share(input_ids_NL), options.process_group
    cosines = dict.fromkeys(blocks, 0.0)
    with options.walk_store(decoder, ids_NL.shape[1]) as store:
        walk = ResidualStreams(decoder, options, store, ids_NL)
        for index in range(decoder.num_layers):
            kinds = present(index)
            if kinds:
                layer = decoder.layer(index, options.device)
                for start, before_BLC in walk.read():
                    after_BLC = walk.through(layer, index, before_BLC, kinds)
                    for block in (block for block in blocks if block.layer == index):
                        one_BLC, other_BLC = before_BLC, after_BLC
                        if block.kinds != KINDS:
                            one_BLC, other_BLC = walk.around(layer, index, block.kinds[0], before_BLC, kinds)
                        cosines[block] += float(_cosine(one_BLC, other_BLC).sum())
                    walk.common.put(start, after_BLC)
                del layer
            progress((index + 1) / decoder.num_layers)
    sums = group.sum_of(*cosines.values(), ids_NL.numel())
    return {block: 1 - cosine / sums[-1] for block, cosine in zip(blocks, sums[:-1], strict=True)}


def _cosine(one_BLC: Tensor, other_BLC: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(one_BLC.float(), other_BLC.float(), dim=-1)
