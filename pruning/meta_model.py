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


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` makes meta tensors: that is how modules make their weights, and nothing else is touched.

    Unlike patches of nn.Module this holds for the calling thread only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
