"""What a statistic of a linear's inputs offers to the walk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pruning.distributed import ProcessGroup


class Accumulator(Protocol):
    """Takes the inputs of one linear batch by batch, on their device."""

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Take inputs of shape (..., I), any float dtype; every leading position is one token. weights: (...) float32,
        how much each token counts; None: once."""

    def skip(self, num_tokens: int) -> None:
        """So many tokens do not reach the linear (another expert's): they count with weight 0."""

    def assume(self, num_tokens: int, square: float) -> None:
        """In the place of so many skipped tokens, as if they had come with inputs independent of each other, of mean
        square (times the weight) `square` each."""

    @property
    def energy(self) -> float:
        """Sum of the squares of all inputs that came to this process, each times its token's weight."""

    def finish(self, name: str, process_group: ProcessGroup | None = None) -> Any:
        """The statistic over the tokens of all processes of the group; the accumulator is used up.

        name: of the linear, for the errors. Raises PruningError when there were no tokens or a value is not finite.
        """


#: makes an accumulator for so many inputs on that device
MakeAccumulator = Callable[[int, torch.device], Accumulator]
