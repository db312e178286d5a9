"""What the layer walk yields, and how it is run.

Shapes: O outputs, I inputs of an output linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning.distributed import ProcessGroup
from pruning.families.forward import SubLayerKind
from pruning.statistics.hessian import Hessian
from pruning.walk.activations import ActivationStore


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


@dataclass(frozen=True)
class WalkOptions:
    """How to run the walk; nothing here changes the answer beyond rounding.

    device: where a layer computes; one layer at a time is there. batch_size: samples per forward.
    activation_budget_bytes: host memory that the activations of all samples may take; what goes beyond it lies in
    files. None: no limit. activation_folder: where those files are made, if the walk has no durable state of its own
    (None: the system's temporary folder). process_group: the processes that share the samples.
    """

    device: torch.device
    batch_size: int = 8
    activation_budget_bytes: int | None = None
    activation_folder: Path | None = None
    process_group: ProcessGroup = field(default_factory=ProcessGroup)

    def activation_store(self, folder: Path | None = None) -> ActivationStore:
        """For the activations of one walk; folder: goes before `activation_folder`."""
        return ActivationStore(self.activation_budget_bytes, folder or self.activation_folder)
