"""What the layer walk yields.

Shapes: O outputs, I inputs of an output linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pruning.families.forward import SubLayerKind
from pruning.statistics.hessian import Hessian


@dataclass(frozen=True)
class SubLayer:
    """What the walk yields: change `linear.weight` in place before the walk goes on, or leave it.

    layer: index. kind: which half of the layer. name: dotted name of the linear. expert, num_experts: which one of how
    many has it, None and 0 if the layer has none. statistic: of the linear's inputs, as
    the layers before it now give them: a Hessian unless the walk was given another accumulator, None if not wanted.
    heldout: the same over the held-out samples, if any. output_scale_O: how much an error of each output counts in the
    residual stream, None for all the same; with a norm behind the linear the tokens of the statistic have weights too
    (see families.forward). keep_heads: to be called with the query and kv heads that stay of an attention: other parts
    of the layer may depend on them.
    """

    layer: int
    kind: SubLayerKind
    name: str
    linear: nn.Linear
    statistic: Any
    heldout: Any = None
    output_scale_O: Tensor | None = None
    expert: int | None = None
    num_experts: int = 0
    keep_heads: Callable[[Sequence[int], Sequence[int]], None] = lambda query_heads, kv_heads: None

    @property
    def ends_layer(self) -> bool:
        """Whether it is the last one of its layer."""
        return self.kind == "mlp" and self.expert in (None, self.num_experts - 1)

    @property
    def counting_weight_OI(self) -> Tensor:
        """The weight, each row times how much its output counts in the residual stream."""
        weight_OI = self.linear.weight.detach()
        return weight_OI if self.output_scale_O is None else weight_OI.float() * self.output_scale_O[:, None]

    @property
    def hessian(self) -> Hessian | None:
        """The statistic of a walk that accumulates Hessians."""
        assert self.statistic is None or isinstance(self.statistic, Hessian), type(self.statistic)
        return self.statistic
