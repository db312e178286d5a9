"""The order in which whole layers, or attentions and MLPs apart, are dropped (Shortened LLaMA, arXiv 2402.02834).

Scores are measured on the model as it stands: once for all, or again after each removal (SLEB, arXiv 2402.09025).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pruning.families.experts import experts_of
from pruning.families.forward import KINDS
from pruning.gradients.backward import walk_backwards
from pruning.orders import Order, Unit
from pruning.ranking.job import RankingJob
from pruning.walk.skipping import Block, SubLayers, influences, losses_without

if TYPE_CHECKING:
    from torch import nn

    from pruning.families import ModelFamily

Criterion = Literal["ppl", "taylor", "magnitude", "influence"]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class DepthRanking:
    """criterion, iterative, unit: see pruning.methods.shortened.OrderConfig. protect_first, protect_last: layers left
    whole. ids_NL: the tokens that scores are measured on."""

    criterion: Criterion
    iterative: bool
    unit: Unit
    protect_first: int
    protect_last: int
    ids_NL: Tensor


def blocks_of(num_layers: int, unit: Unit) -> tuple[Block, ...]:
    """All blocks that a model has, in order: its layers, or the attention and the MLP of each."""
    if unit == "layer":
        return tuple(Block(layer) for layer in range(num_layers))
    return tuple(Block(layer, (kind,)) for layer in range(num_layers) for kind in KINDS)


def removable(num_layers: int, unit: Unit, protect_first: int, protect_last: int) -> tuple[Block, ...]:
    """The blocks that may go. The first attention stays where attentions go apart: the length of a KV cache is read
    from it."""
    free = range(protect_first, num_layers - protect_last)
    return tuple(
        block
        for block in blocks_of(num_layers, unit)
        if block.layer in free and (unit == "layer" or block != Block(0, ("attention",)))
    )


def most_removable(num_layers: int, unit: Unit, protect_first: int, protect_last: int) -> int:
    """How many of them may go at most: of whole layers one always stays."""
    free = len(removable(num_layers, unit, protect_first, protect_last))
    return min(free, num_layers - 1) if unit == "layer" else free


def rank_depth(job: RankingJob, ranking: DepthRanking) -> None:
    """Write the order of the layers, under the name of their stack; of all blocks that may go, one always stays.

    An interrupted ranking that measures anew after each removal goes on with the removals that lie in `job.work`.
    """
    decoder = job.decoder
    names = {block: index for index, block in enumerate(blocks_of(decoder.num_layers, ranking.unit))}
    free = removable(decoder.num_layers, ranking.unit, ranking.protect_first, ranking.protect_last)
    most = most_removable(decoder.num_layers, ranking.unit, ranking.protect_first, ranking.protect_last)
    iterative = ranking.iterative and ranking.criterion != "magnitude"  # which no removal changes
    removals = _Removals(job.work if iterative else None, names)
    while len(removals) < most:
        left = [block for block in free if block not in removals.scores]
        done = len(removals)

        def progress(share: float, done: int = done) -> None:
            at, of = (done + share, most) if iterative else (share, 1)
            job.progress(at / of, f"removal {done + 1} of {most}" if iterative else "scoring")

        measured = _score(job, ranking, left, SubLayers(removals.scores), progress)
        # one process decides: rounding on another device must not make two of them disagree
        scores = job.options.process_group.decide(lambda measured=measured: measured)  # type: ignore[misc]
        by_score = sorted(left, key=lambda block: (scores[block], block))
        for block in by_score[: 1 if iterative else most]:
            removals.add(block, scores[block])
    if job.options.process_group.leads:
        order = [names[block] for block in removals.scores]
        by_name = {names[block]: score for block, score in removals.scores.items()}
        scores_of_all = [by_name.get(name, 0.0) for name in range(len(names))]
        job.orders.save(decoder.family.layers_path, ranking.unit, Order.of_scores(scores_of_all, order))


class _Removals:
    """Blocks that are gone, in order, with their scores; in a file if there is a folder for it."""

    def __init__(self, work: Path | None, names: dict[Block, int]) -> None:
        self._file, self._names = (work / "removals.json" if work else None), names
        self.scores: dict[Block, float] = {}
        if self._file and self._file.is_file():
            blocks = list(names)
            for name, score in json.loads(self._file.read_bytes()):
                self.scores[blocks[name]] = score

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, block: Block, score: float) -> None:
        self.scores[block] = score
        if self._file:
            unfinished = self._file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps([(self._names[each], value) for each, value in self.scores.items()]))
            os.replace(unfinished, self._file)


def _score(
    job: RankingJob, ranking: DepthRanking, blocks: Sequence[Block], present: SubLayers, progress: Progress
) -> dict[Block, float]:
    """How much each of the blocks is worth to the model as it stands; "ppl" as the loss, which does not overflow."""
    decoder, options = job.decoder, job.options
    match ranking.criterion:
        case "ppl":
            return losses_without(decoder, ranking.ids_NL, options, blocks, present, progress=progress)
        case "influence":
            return influences(decoder, ranking.ids_NL, options, blocks, present, progress=progress)
        case "taylor":
            found = {}
            walk = walk_backwards(decoder, ranking.ids_NL, options, present=present, progress=progress)
            for layer in walk:
                for block in (block for block in blocks if block.layer == layer.layer):
                    found[block] = _sum_of_weights(decoder.family, layer.module, block, layer.gradients)
            return found
        case "magnitude":
            found = {}
            for index, of_layer in groupby(blocks, key=lambda block: block.layer):
                module = decoder.layer(index, options.device)
                found |= {block: _sum_of_weights(decoder.family, module, block, None) for block in of_layer}
                progress((index + 1) / decoder.num_layers)
            return found


def _sum_of_weights(family: ModelFamily, layer: nn.Module, block: Block, gradients: dict[str, Tensor] | None) -> float:
    """Sum of |W|, or of |W * dL/dW|, over the linears of a block."""
    roles = [role for kind in block.kinds for role in ("qkvo" if kind == "attention" else ("gate", "up", "down"))]
    projections = family.projections(layer)
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    total = 0.0
    for rows in (projections[role] for role in roles if role in projections):
        weight_OI = rows.weight_OI.detach().float()
        if gradients is not None:
            weight_OI = weight_OI * rows.rows_of(gradients[names[id(rows.linear.weight)]])
        total += float(weight_OI.abs().sum(dtype=torch.float64))
    experts = experts_of(family, layer) if "mlp" in block.kinds else None
    for weight in (experts.module.gate_up_proj, experts.module.down_proj) if experts else ():
        counted = weight.detach() if gradients is None else weight.detach() * gradients[names[id(weight)]]
        total += float(counted.abs().sum(dtype=torch.float64))
    return total
