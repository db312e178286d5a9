"""Factors on what heads and channels give to the residual stream: on the inputs of the output linears while a model
trains, and in those linears' weights afterwards. A factor of 0 takes a group out of the model.

Shapes: N groups of a site, I input columns of its output linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.families import family_of
from pruning.families.forward import output_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.families.sites import Site

Factors = Mapping[str, Tensor]
"""By the name of a site, (N,)."""


@contextmanager
def masking(model: PreTrainedModel, sites: Sequence[Site], factors: Callable[[], Factors]) -> Iterator[None]:
    """The model computes with the factors that there are at each forward, as long as the block lasts."""
    family = family_of(model)
    layers = family.layers(model)
    hooks = [
        output_linear(family, layers[site.layer], site.kind).register_forward_pre_hook(_hook(site, factors))
        for site in sites
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(site: Site, factors: Callable[[], Factors]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def masked(linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs_BLI, *others = inputs
        return (inputs_BLI * by_column(site, factors()[site.name]).to(inputs_BLI.dtype), *others)

    return masked


def by_column(site: Site, factor_N: Tensor) -> Tensor:
    """The factor of each input column, (I,): the columns of a group stand together, and groups in their order."""
    return factor_N.repeat_interleave(site.columns_ND.shape[1])


@torch.no_grad()
def fold_(model: PreTrainedModel, sites: Sequence[Site], factors: Factors) -> None:
    """Multiply the columns of the output linears, so that the model computes without masks what it did with them."""
    family = family_of(model)
    layers = family.layers(model)
    for site in sites:
        weight_OI = output_linear(family, layers[site.layer], site.kind).weight
        factor_I = by_column(site, factors[site.name]).to(weight_OI.device, torch.float32)
        # a weight that is not finite times 0 would not be 0
        weight_OI.copy_(torch.where(factor_I == 0, 0.0, weight_OI.float() * factor_I).to(weight_OI.dtype))
