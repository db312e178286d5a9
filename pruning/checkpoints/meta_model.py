"""Models without weights: what a class builds from a config, at no cost of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def meta_model(model_class: Any, config: Any) -> PreTrainedModel:
    """A model without weights: parameters on the meta device, buffers (rotary tables) real."""
    with _EmptyOnMeta():
        model: PreTrainedModel = model_class(config)
    return model


class NothingDrawn(TorchFunctionMode):
    """Random values for meta tensors are not drawn: they would be nothing, and take most of the time that a model
    without weights takes. Like every mode of its kind it holds for the calling thread only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.init.normal_:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class _EmptyOnMeta(NothingDrawn):
    """`torch.empty` makes meta tensors: that is how modules make their weights; nothing else is touched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            kwargs = dict(kwargs or {}) | {"device": "meta"}
        return super().__torch_function__(func, types, args, kwargs)
