"""Statistics of the experts of one layer, of all of them in one pass over the tokens.

Each token counts for the experts that the router sends it to, with the square of what the router multiplies their
outputs with: so much an error of theirs counts in the stream. Means are over all tokens, so that the errors of all
linears are in the same unit. An expert that saw fewer tokens than it has channels is given the missing ones: as if they
had come with independent inputs, as large on average as those of the layer's experts. Without any token what is left of
a score is then the size of the output weights.

Shapes: B samples, L tokens per sample, C residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruning.distributed import ProcessGroup

if TYPE_CHECKING:
    from pruning.families.experts import Experts
    from pruning.statistics.accumulator import MakeAccumulator


@dataclass(frozen=True)
class Few:
    """An expert that saw fewer tokens than it has channels."""

    name: str
    num_tokens: int
    num_channels: int


class ExpertStatistics:
    """What is added up of the inputs of each expert's output linear."""

    def __init__(self, experts: Experts, accumulator: MakeAccumulator, device: torch.device) -> None:
        self._experts, self._size = experts, experts.size
        self._accumulators = [accumulator(self._size, device) for _ in range(experts.num_experts)]
        self._counts = [0] * experts.num_experts

    def add(self, read_BLC: Tensor) -> None:
        """Take the tokens that the layer's experts read."""
        num_tokens = read_BLC.shape[:-1].numel()
        for routed in self._experts.routed(read_BLC):
            accumulator, came = self._accumulators[routed.expert], len(routed.inputs_TI)
            if came:
                accumulator.add(routed.inputs_TI, routed.weights_T.square())
            accumulator.skip(num_tokens - came)
            self._counts[routed.expert] += came

    def finish(
        self, name_of: Callable[[int], str], process_group: ProcessGroup, *, complete: bool = True
    ) -> tuple[list[Any], list[Few]]:
        """The statistics over the tokens of all processes, and which experts saw few tokens. complete: whether these
        are given the missing ones."""
        counts = [int(count) for count in process_group.sum_of(*self._counts)]
        few = [Few(name_of(e), count, self._size) for e, count in enumerate(counts) if count < self._size]
        energies = process_group.sum_of(*(each.energy for each in self._accumulators)) if few and complete else (0.0,)
        square = sum(energies) / (self._size * sum(counts)) if sum(counts) else 0.0
        found = []
        for expert, count in enumerate(counts):
            accumulator = self._accumulators[expert]
            if complete and count < self._size and process_group.leads:
                accumulator.assume(self._size - count, square)
            found.append(accumulator.finish(name_of(expert), process_group))
            self._accumulators[expert] = None  # type: ignore[call-overload]  # used up: its memory is the statistic's
        return found, few


def sentence_about(few: list[Few]) -> str:
    """For a warning."""
    least = min(few, key=lambda each: each.num_tokens)
    return (
        f"{len(few)} experts saw fewer calibration tokens than they have channels (the fewest: {least.name}, "
        f"{least.num_tokens} of {least.num_channels}): the missing ones are taken to be like the layer's average; "
        "raise num_samples or seq_len"
    )
