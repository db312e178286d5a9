"""A causal LM whose decoder layers come one at a time: from memory, or from the files of a checkpoint too large for it.

A layer that was handed out is a fresh copy and may be changed; the model it came from stays as it was.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruning.errors import PruningError
from pruning.families import ModelFamily, family_of
from pruning.folders import class_of_folder, tensor_files

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

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.family.layers(self.skeleton))


class ResidentDecoder(Decoder):
    """A model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.skeleton, self.family = model, family_of(model)

    def layer(self, index: int, device: torch.device) -> nn.Module:
        """A fresh copy of a decoder layer on `device`."""
        layer = _copy(self.family.layers(self.skeleton)[index], self.skeleton.config)
        return layer.to(device).requires_grad_(False).eval()


class StreamedDecoder(Decoder):
    """A checkpoint folder whose layers are read from its safetensors when they are asked for.

    In memory: everything but the layers, and the layers that the caller holds. Raises PruningError if the folder is no
    checkpoint of a supported family or lacks a weight.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model_class = class_of_folder(folder)
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        self.skeleton = meta_model(model_class, config)
        self.family = family_of(self.skeleton)
        self._file_of = tensor_files(folder)
        layers = f"{self.family.layers_path}."
        outside = {name for name in self.skeleton.state_dict() if not name.startswith(layers)} & self._file_of.keys()
        _assign_(self.skeleton, self._read(outside, str), folder)
        self.skeleton.tie_weights()
        _check_complete(self.skeleton, outside, folder, but=layers)
        self.skeleton.eval().requires_grad_(False)

    def layer(self, index: int, device: torch.device) -> nn.Module:
        """A fresh copy of a decoder layer on `device`, read from its file."""
        layer = _copy(self.family.layers(self.skeleton)[index], self.skeleton.config)
        prefix = f"{self.family.layers_path}.{index}."
        names = {prefix + name for name in layer.state_dict()} & self._file_of.keys()
        tensors = self._read(names, lambda name: name.removeprefix(prefix))
        _assign_(layer, tensors, self.folder)
        _check_complete(layer, tensors.keys(), self.folder)
        return layer.to(device).requires_grad_(False).eval()

    def _read(self, names: set[str], rename: Callable[[str], str]) -> dict[str, Tensor]:
        """The tensors, each a copy of its own: a mapped file would stay resident as long as one of them lives."""
        read: dict[str, Tensor] = {}
        for file in sorted({self._file_of[name] for name in names}):
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in sorted(name for name in names if self._file_of[name] == file):
                        read[rename(name)] = shard.get_tensor(name).clone()
            except (SafetensorError, OSError) as error:
                raise PruningError(f"cannot load the weights in {file}: {error}") from error
        return read


def meta_model(model_class: Any, config: Any) -> PreTrainedModel:
    """A model without weights: parameters on the meta device, buffers (rotary tables) real."""
    with _EmptyOnMeta():
        model: PreTrainedModel = model_class(config)
    return model


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` makes meta tensors: that is how modules make their weights, and nothing else is touched.

    Unlike patches of nn.Module this holds for the calling thread only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _copy(layer: nn.Module, config: Any) -> nn.Module:
    # all layers share the model's config: a copy of a layer needs none of its own
    return copy.deepcopy(layer, {id(config): config})


def _assign_(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise PruningError(f"{folder} misshapes a weight, save it again: {str(error).splitlines()[-1]}") from error


def _check_complete(module: nn.Module, stored: Set[str], folder: Path, *, but: str | None = None) -> None:
    # not by who is on the meta device: modules make the weights of a norm with torch.ones
    missing = [
        name for name, _ in module.named_parameters() if name not in stored and not (but and name.startswith(but))
    ]
    if missing:
        raise PruningError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]}: save it again")
