"""A training whose weights, gradients and moments lie in pieces over the processes: PyTorch's fully_shard (FSDP2) does
what ZeRO-3 does (arXiv 1910.02054, section 5). A layer is whole while it is computed with, and no longer.

transformers' Trainer trains such a model but keeps no optimizer state of one: what is saved here is whole, in files of
the one process that writes, and each takes its pieces of them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS, _OPTIMIZER, _SCHEDULER = "model.safetensors", "optimizer.pt", "scheduler.pt"


def in_pieces(
    model: PreTrainedModel,
    layers_of: Callable[[PreTrainedModel], Iterable[nn.Module]],
    device: torch.device,
    num_processes: int,
) -> PreTrainedModel:
    """A copy of the model in float32, each weight cut along its first dimension over the processes of the group, each
    with its pieces on its device. What of the model requires gradients does so there."""
    mesh = init_device_mesh(device.type, (num_processes,))
    pieces = copy.deepcopy(model)
    for layer in layers_of(pieces):  # one by one, so that no process has all of it in float32
        fully_shard(layer.float(), mesh=mesh)
    for tensor in (*pieces.parameters(), *pieces.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, DTensor):
            tensor.data = tensor.data.float()
    fully_shard(pieces, mesh=mesh)
    # so that the Trainer leaves it where it is
    pieces._is_distributed_loading_by_transformers = True
    return pieces


def is_in_pieces(model: nn.Module) -> bool:
    """Whether `in_pieces` made it."""
    return isinstance(model, FSDPModule)


def part_(model: nn.Module) -> None:
    """Have all weights of a model in pieces be pieces again: after a forward pass without a backward pass those outside
    of its layers are whole, and are then other tensors than those that the optimizer knows."""
    if isinstance(model, FSDPModule):
        model.reshard()


@torch.no_grad()
def put_together_(model: nn.Module, pieces: nn.Module) -> None:
    """Give a model the weights of its pieces, in its own dtype, in every process."""
    for parameter, piece in zip(model.parameters(), pieces.parameters(), strict=True):
        parameter.copy_(_whole(piece.data))


def whole(tensors: Iterable[tuple[str, Tensor]], *, kept: bool) -> dict[str, Tensor]:
    """Tensors put together one by one, by name and on the CPU; all processes must ask. kept: by this one, others get
    nothing."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        together = _whole(tensor.detach())
        if kept:
            found[name] = together.cpu().contiguous()
    return found


@torch.no_grad()
def take_(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter its values, of which it may be a piece."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        # every process has all the values, so that nothing need be sent
        values = distribute_tensor(values.to(parameter.to_local().device), mesh, placements, src_data_rank=None)
    parameter.copy_(values)


class ShardableTrainer(Trainer):  # type: ignore[misc]
    """The Trainer with checkpoints of models in pieces, which it goes on from."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not is_in_pieces(self.model):
            super()._save(output_dir, state_dict)
            return
        weights = whole(self.model.named_parameters(), kept=self.args.should_save)
        if self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not is_in_pieces(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_(self.model, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_in_pieces(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self._moments(), options=_whole_on_the_host())
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, _OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, _SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not is_in_pieces(self.model) or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # mapped, so that processes of one machine share its pages; each takes its pieces of it
        state = torch.load(os.path.join(checkpoint, _OPTIMIZER), map_location="cpu", mmap=True, weights_only=True)
        set_optimizer_state_dict(self.model, self._moments(), state, options=StateDictOptions(full_state_dict=True))
        scheduler = torch.load(os.path.join(checkpoint, _SCHEDULER), map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Nothing is deferred: gradients would be kept whole from one micro batch to the next."""
        return nullcontext()

    def _moments(self) -> torch.optim.Optimizer:
        """The optimizer itself, without accelerate's wrapper."""
        wrapper: Any = self.optimizer
        optimizer: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
        return optimizer


def load_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model, which may be in pieces, its parameters by name."""
    for name, parameter in model.named_parameters():
        take_(parameter, weights[name])


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole_on_the_host() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)
