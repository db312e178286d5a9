"""A causal LM whose decoder layers come one at a time: from memory, or from the files of a checkpoint too large for it.

A layer that was handed out is a fresh copy and may be changed; the model it came from stays as it was.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.checkpoints.meta_model import meta_model
from pruning.checkpoints.stored_tensors import stored_tensors
from pruning.errors import memory_for
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
        return _on(device, layer)


class StreamedDecoder(Decoder):
    """A checkpoint folder whose layers are read from its safetensors when they are asked for.

    In memory: everything but the layers, and the layers that the caller holds. For a device other than the CPU, where
    layers asked for in turn take no host memory, the next one is read meanwhile. Raises PruningError if the folder is
    no whole checkpoint of a supported family (see `stored_tensors`).
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
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    def layer(self, index: int, device: torch.device) -> nn.Module:
        """Read from its files in the checkpoint's dtype."""
        layer = _copy(self.family.layers(self.skeleton)[index], self.skeleton.config)
        begun = self._ahead.pop(index, None)
        self._ahead.clear()  # what was not wanted
        tensors = self._read(index) if begun is None else begun.result()
        if device.type != "cpu" and (begun or not index) and index + 1 < self.num_layers:
            self._ahead[index + 1] = _in_thread(lambda: self._read(index + 1))
        layer.load_state_dict(tensors, assign=True)
        return _on(device, layer)

    def _read(self, index: int) -> dict[str, Tensor]:
        """The weights of a layer by their names in it."""
        prefix = f"{self.family.layers_path}.{index}."
        names = self.family.layers(self.skeleton)[index].state_dict()
        tensors = self._stored.read(prefix + name for name in names)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _in_thread(work: Callable[[], dict[str, Tensor]]) -> Future[dict[str, Tensor]]:
    """What the work gives or raises; a daemon does it, which nobody waits for who does not ask."""
    future: Future[dict[str, Tensor]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="slimline-read-ahead", daemon=True).start()
    return future


def _on(device: torch.device, layer: nn.Module) -> nn.Module:
    with memory_for("loading"):
        return layer.to(device).requires_grad_(False).eval()


def _is(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    return all(parameter.device == device and parameter.dtype == dtype for parameter in module.parameters())


def _copy(layer: nn.Module, config: Any) -> nn.Module:
    # all layers share the model's config: a copy of a layer needs none of its own
    return copy.deepcopy(layer, {id(config): config})
