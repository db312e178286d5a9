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

    def finish(self, name: str, process_group: ProcessGroup | None = None) -> Any:
        """The statistic over the tokens of all processes of the group; the accumulator is used up.

        name: of the linear, for the errors. Raises PruningError when there were no tokens or a value is not finite.
        """


#: makes an accumulator for so many inputs on that device
MakeAccumulator = Callable[[int, torch.device], Accumulator]
