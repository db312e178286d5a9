"""A causal LM whose decoder layers come one at a time: from memory, or from the files of a checkpoint too large for it.

A layer that was handed out is a fresh copy and may be changed; the model it came from stays as it was.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.checkpoints.meta_model import meta_model
from pruning.checkpoints.stored_tensors import stored_tensors
from pruning.families import ModelFamily, family_of
from pruning.families.forward import finish_logits
from pruning.families.parts import check_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder(ABC):
    """What pruning sees of a model.

    skeleton: the model object; embeddings, norms, rotary tables and head are real, the weights of decoder layers may
    be on the meta device (their shapes are true). family: its row of names.
    """

    skeleton: PreTrainedModel
    family: ModelFamily

    @abstractmethod
    def layer(self, index: int, device: torch.device) -> nn.Module:
        """A fresh copy of a decoder layer on `device`, in eval mode, without gradients."""

    def logits_of(self, device: torch.device, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        """From the residual stream after the last layer, on `device` in `dtype` (None: the model's), to logits: final
        norm, head, and what the family makes of its outputs."""
        parts = [self.family.final_norm(self.skeleton), self.family.head(self.skeleton)]
        wanted = dtype or self.family.embeddings(self.skeleton).weight.dtype
        # the decoder's own parts stay as they are
        head = nn.Sequential(
            *(part if _is(part, device, wanted) else copy.deepcopy(part).to(device, wanted) for part in parts)
        )
        finish = finish_logits(self.family, self.skeleton.config)
        return head if finish is None else lambda stream: finish(head(stream))

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model as it is before pruning."""
        return len(self.family.layers(self.skeleton))


class ResidentDecoder(Decoder):
    """A model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.skeleton, self.family = model, family_of(model)
        check_parts(self.family, model)

    def layer(self, index: int, device: torch.device) -> nn.Module:
        """A copy, so that pruning it leaves the model as it is."""
        layer = _copy(self.family.layers(self.skeleton)[index], self.skeleton.config)
        return layer.to(device).requires_grad_(False).eval()


class StreamedDecoder(Decoder):
    """A checkpoint folder whose layers are read from its safetensors when they are asked for.

    In memory: everything but the layers, and the layers that the caller holds. Raises PruningError if the folder is no
    whole checkpoint of a supported family (see `stored_tensors`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored = stored_tensors(folder)
        self.skeleton = meta_model(self._stored.model_class, self._stored.config)
        self.family = self._stored.family
        outside = [name for name in self._stored.places if not name.startswith(f"{self.family.layers_path}.")]
        self.skeleton.load_state_dict(self._stored.read(outside), strict=False, assign=True)
        self.skeleton.tie_weights()
        self.skeleton.eval().requires_grad_(False)

    def layer(self, index: int, device: torch.device) -> nn.Module:
        """Read from its files in the checkpoint's dtype."""
        layer = _copy(self.family.layers(self.skeleton)[index], self.skeleton.config)
        prefix = f"{self.family.layers_path}.{index}."
        tensors = self._stored.read(prefix + name for name in layer.state_dict())
        layer.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)
        return layer.to(device).requires_grad_(False).eval()


def _is(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    return all(parameter.device == device and parameter.dtype == dtype for parameter in module.parameters())


def _copy(layer: nn.Module, config: Any) -> nn.Module:
    # all layers share the model's config: a copy of a layer needs none of its own
    return copy.deepcopy(layer, {id(config): config})
