"""Sizes of a model that follow from its shapes: parameters, multiply-accumulates, bytes of its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention: query heads, and the widths of a cached key and value over all kv heads."""

    num_heads: int
    key_dim: int
    value_dim: int
    cache_bytes_per_token: int

    def macs(self, length: int) -> int:
        """Scores and mixed values of `length` tokens, each with each: num_heads * length^2 * (key_dim + value_dim).

        Half of them lie in the future and are masked; eager attention computes them, and LLM-Pruner's counter (arXiv
        2305.11627) and others count them.
        """
        return self.num_heads * length**2 * (self.key_dim + self.value_dim)


@torch.inference_mode()
def attention_shapes(model: PreTrainedModel) -> tuple[AttentionShape, ...]:
    """One per decoder layer, from the cache that a forward pass of one token leaves: layers may differ."""
    token_11 = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    cache = model(input_ids=token_11, use_cache=True).past_key_values
    layers = model.config.per_layer_config
    return tuple(
        AttentionShape(
            num_heads=int(config.num_attention_heads),
            key_dim=layer.keys.shape[-1],
            value_dim=layer.values.shape[-1],
            cache_bytes_per_token=_bytes(layer.keys) + _bytes(layer.values),
        )
        for config, layer in zip(layers, cache.layers, strict=True)
    )


def attention_macs(shapes: tuple[AttentionShape, ...], *, batch_size: int, length: int) -> int:
    """Of all layers, for a batch of sequences of `length` tokens."""
    return batch_size * sum(shape.macs(length) for shape in shapes)


def linear_macs_per_token(model: nn.Module) -> int:
    """One multiply-accumulate per weight of every nn.Linear; of a mixture of experts, per weight of its router and of
    as many experts as a token goes to."""
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return linears + sum(_experts_macs_per_token(module) for module in model.modules())


def _experts_macs_per_token(block: Any) -> int:
    """Of a module with a router and experts in tensors of one row of matrices per expert, 0 of any other."""
    router, experts = getattr(block, "gate", None), getattr(block, "experts", None)
    if router is None or not hasattr(router, "top_k") or experts is None:
        return 0
    matrices = [weight for weight in experts.parameters() if weight.dim() == 3]
    active = sum(weight[0].numel() * min(router.top_k, len(weight)) for weight in matrices)
    return int(router.weight.numel() + active)


def count_parameters(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
