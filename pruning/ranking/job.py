"""What a ranking is given, and how orders of heads and channels follow from their scores.

Shapes: H query heads, K kv heads, I channels of the MLP.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pruning.families import shapes
from pruning.families.forward import output_name
from pruning.orders import Order, Orders

if TYPE_CHECKING:
    from pruning.calibration import CalibrationSet
    from pruning.checkpoints.decoder import Decoder
    from pruning.distributed import ProcessGroup
    from pruning.plan import LayerShape
    from pruning.walk.options import WalkOptions


@contextmanager
def orders_or_made(orders: Path | None, group: ProcessGroup, make: Callable[[Path], None]) -> Iterator[Orders]:
    """The orders that are given, or those that `make` writes into a folder that all processes of the group share and
    that lasts as long as the block."""
    if orders is not None:
        yield Orders(orders)
        return
    folder = Path(group.decide(lambda: tempfile.mkdtemp(prefix="slimline-orders-")))
    try:
        make(folder)
        group.sum_of(1)  # so that all have written before anyone reads
        yield Orders(folder)
        group.sum_of(1)
    finally:
        if group.leads:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class RankingJob:
    """decoder: the model as it is. calibration: its tokens. orders: where the orders go. work: a folder that outlives
    an interruption, None if there is none. progress: called with a share and a message."""

    decoder: Decoder
    calibration: CalibrationSet
    orders: Orders
    options: WalkOptions
    work: Path | None = None
    progress: Callable[[float, str], None] = lambda share, message: None

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Widths of all layers."""
        return shapes(self.decoder.skeleton)

    def layer_done(self, layer: int) -> None:
        """Report progress; layers may come in any order of depth, one after another."""
        count = self.decoder.num_layers
        self.progress((layer + 1) / count, f"layer {layer + 1} of {count}")

    def save_heads(self, layer: int, query_H: Tensor, group_K: Tensor) -> None:
        """Write the orders of an attention by both units: query_H, what goes with a query head alone; group_K, what
        goes with a whole kv group."""
        if not self.options.process_group.leads:
            return
        shape, name = self.shapes[layer], output_name(self.decoder.family, layer, "attention")
        self.orders.save(name, "kv_group", Order.of_scores(group_K.detach().double().cpu().tolist()))
        if shape.num_groups > 1:
            scores_KG = query_H.detach().double().cpu().reshape(shape.num_kv_heads, shape.num_groups)
            self.orders.save(name, "query_head", one_of_every_group(scores_KG))

    def save_channels(self, layer: int, scores_I: Tensor, expert: int | None = None) -> None:
        """Write the order of the channels of an MLP, or of one expert of a layer that has experts."""
        if self.options.process_group.leads:
            name = output_name(self.decoder.family, layer, "mlp", expert)
            self.orders.save(name, "channel", Order.of_scores(scores_I.detach().double().cpu().tolist()))


def one_of_every_group(scores_KG: Tensor) -> Order:
    """Round by round the cheapest head that each kv group still has, from the scores of its heads; in a round the
    groups by rising score."""
    num_groups = scores_KG.shape[1]
    cheapest_KG = scores_KG.sort(dim=1, stable=True)
    order: list[int] = []
    for round_ in range(num_groups):
        of_round = [
            (score, group * num_groups + head)
            for group, (score, head) in enumerate(
                zip(cheapest_KG.values[:, round_].tolist(), cheapest_KG.indices[:, round_].tolist(), strict=True)
            )
        ]
        order += [head for _, head in sorted(of_round)]
    return Order.of_scores(scores_KG.flatten().tolist(), order)
