"""How to run a walk, and how much memory its activations may take where nobody says: what is free, less what the walk
itself needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pruning.activations.tiers import ActivationStore
from pruning.distributed import ProcessGroup
from pruning.families.experts import experts_of

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder

#: matrices of inputs x inputs of the widest linear in bytes per element: Hessians of calibration and held-out tokens
#: (float32), and in float64 what solving takes (see obs.elimination)
_HESSIAN_BYTES = 2 * 4
_MATRIX_BYTES = _HESSIAN_BYTES + 3 * 8
#: of one batch at once, in values per token: of the stream's width and of the widest linear's inputs
_STREAM_VALUES, _INNER_VALUES = 12, 5
#: of what is free, what stays so: the allocator's blocks do not all fit
_SLACK = 0.05


@dataclass(frozen=True)
class WalkOptions:
    """How to run the walk; nothing here changes the answer beyond rounding.

    device: where layers compute; two at a time are there. batch_size: samples per forward. activation_budget_bytes:
    host memory that the activations of all samples may take; what goes beyond it lies in files. None: no limit.
    device_budget_bytes: the same of the device, if it has memory of its own; what goes beyond it lies on the host.
    None: what is free when the walk begins, less what it needs itself. activation_folder: where those files are made,
    if the walk has no durable state of its own (None: the system's temporary folder). process_group: the processes
    that share the samples.
    """

    device: torch.device
    batch_size: int = 8
    activation_budget_bytes: int | None = None
    device_budget_bytes: int | None = None
    activation_folder: Path | None = None
    process_group: ProcessGroup = field(default_factory=ProcessGroup)

    def activation_store(self, reserve_bytes: int, folder: Path | None = None) -> ActivationStore:
        """For the activations of one walk. reserve_bytes: what it needs of the device beside them. folder: goes before
        `activation_folder`."""
        on_device = self.device_budget_bytes
        return ActivationStore(
            self.activation_budget_bytes,
            folder or self.activation_folder,
            device=self.device,
            device_budget_bytes=device_budget(self.device, reserve_bytes) if on_device is None else on_device,
        )

    def walk_store(self, decoder: Decoder, seq_len: int, folder: Path | None = None) -> ActivationStore:
        """For the activations of a walk forward through samples of that many tokens."""
        return self.activation_store(walk_reserve(decoder, self.batch_size * seq_len), folder)


def free_on_device(device: torch.device) -> int | None:
    """Bytes that this process can still allocate there; None where the device does not tell, or has none of its own."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    # what the allocator of torch holds for later is free too
    return int(free) + int(module.memory_reserved(device)) - int(module.memory_allocated(device))


def device_budget(device: torch.device, reserve_bytes: int) -> int:
    """For activations, when so many bytes are needed beside them; 0 where that is not known."""
    free = free_on_device(device)
    return 0 if free is None else max(0, int((1 - _SLACK) * free) - reserve_bytes)


def walk_reserve(decoder: Decoder, batch_tokens: int) -> int:
    """Bytes that a layer walk needs beside activations: two layers, the Hessians and the solving of the widest linear,
    and the forward of one batch of that many tokens."""
    family, skeleton = decoder.family, decoder.skeleton
    layers, item = family.layers(skeleton), family.embeddings(skeleton).weight.dtype.itemsize
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    widths, together = [], 0
    for layer in layers:
        widths.append(family.o_proj(layer).in_features)
        experts = experts_of(family, layer)
        if experts is None:
            widths.append(family.down_proj(layer).in_features)
        else:  # the statistics of all of them are there at once
            widths.append(experts.size)
            together = max(together, experts.num_experts * experts.size**2)
    widest = max(widths)
    per_token = _STREAM_VALUES * skeleton.config.hidden_size + _INNER_VALUES * widest
    matrices = _MATRIX_BYTES * widest**2 + _HESSIAN_BYTES * together
    return int(2 * largest * item + matrices + batch_tokens * per_token * item)
