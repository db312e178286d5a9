"""The rows of a linear that have one role: all of them, or a part of a fused linear.

Shapes: O rows of the role, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """Rows `start` to `stop` of a linear."""

    linear: nn.Linear
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Output features of the role."""
        return self.stop - self.start

    @property
    def parameters_per_row(self) -> int:
        """Weights of one row, and its bias if there is one."""
        return self.linear.in_features + (self.linear.bias is not None)

    @property
    def weight_OI(self) -> Tensor:
        """The weights of the rows, as a view."""
        return self.rows_of(self.linear.weight)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor that has a row for each of the linear's, as a view."""
        return tensor[self.start : self.stop]
