"""A norm that spans all heads of an attention (OLMo-2's of queries and keys): what it computes when some have gone.

Its root mean square is then that of the features that stay. A model that is masked instead of cut gets norms that look
at these features alone, so that both compute the same.

Shapes: F features of all heads, K features that stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pruning.families.family import ModelFamily


class _OfKept:
    """A root-mean-square norm of some of its features, the others come out as 0; goes before the stock one."""

    def forward(self: Any, features_BLF: Tensor) -> Tensor:
        kept_K = self.kept_K.to(features_BLF.device)
        normed_BLK = rms_norm(features_BLF[..., kept_K], self.weight[kept_K], self.epsilon)
        return torch.zeros_like(features_BLF).index_copy(-1, kept_K, normed_BLK)


def rms_norm(features_BLK: Tensor, weight_K: Tensor, epsilon: float) -> Tensor:
    """The features over their root mean square, in float32, times the weight."""
    wide_BLK = features_BLK.float()
    normed_BLK = wide_BLK * torch.rsqrt(wide_BLK.square().mean(-1, keepdim=True) + epsilon)
    return (weight_K * normed_BLK).to(features_BLK.dtype)


@cache
def _class_of_kept(norm_class: type) -> type:
    return type(f"{norm_class.__name__}OfKept", (_OfKept, norm_class), {"stock_class": norm_class})


def head_features(heads: Sequence[int], head_dim: int) -> Tensor:
    """Indices of the features of some heads, int64: heads lie one after another, head_dim wide each."""
    starts_H = torch.tensor(heads, dtype=torch.int64)
    return (starts_H[:, None] * head_dim + torch.arange(head_dim)).flatten()


def mask_head_norms_(
    family: ModelFamily, layer: nn.Module, query_heads: Sequence[int], kv_heads: Sequence[int]
) -> None:
    """Let the norms that span heads look at these heads alone, if the family has such norms; shapes stay."""
    for module, kept_K in _spanning(family, layer, query_heads, kv_heads):
        module.kept_K, module.epsilon = kept_K, float(getattr(module, family.norm_epsilon_name))
        masked = isinstance(module, _OfKept)
        if not masked:
            module.__class__ = _class_of_kept(type(module))  # type: ignore[arg-type]


def cut_head_norms_(family: ModelFamily, layer: nn.Module, query_heads: Sequence[int], kv_heads: Sequence[int]) -> None:
    """Cut the norms that span heads to these heads; masked ones are stock ones again."""
    for module, kept_K in _spanning(family, layer, query_heads, kv_heads):
        masked = isinstance(module, _OfKept)
        if masked:
            module.__class__ = module.stock_class
            del module.kept_K, module.epsilon
        weight_F: Tensor = module.weight
        taken_K = weight_F.detach().index_select(0, kept_K.to(weight_F.device))
        module.weight = nn.Parameter(taken_K, requires_grad=weight_F.requires_grad)


def _spanning(
    family: ModelFamily, layer: nn.Module, query_heads: Sequence[int], kv_heads: Sequence[int]
) -> Iterator[tuple[Any, Tensor]]:
    """The norms that span heads, with the features of theirs that stay."""
    if family.head_norms_span_heads:
        head_dim = family.head_dim_of(layer)
        for norm, heads in zip(family.head_norms(layer), (query_heads, kv_heads), strict=True):
            yield norm, head_features(heads, head_dim)
