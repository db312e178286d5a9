"""The naive schedule, as reference: every layer three times forward, every round a full inversion.

Plain SlimGPT arithmetic (arXiv 2412.18110, sections 3.1 to 3.3), written from the formulas alone and not for speed:
nothing of the product's walk or elimination is used. It removes what it is told to, by the group sizes it is told, in
families whose layers all get the same arguments (Llama, not sliding windows).

Shapes: B windows, L tokens, C residual stream, T tokens, O outputs, I inputs, N groups, D columns per group, R columns
that remain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import ModelFamily, family_of
from pruning.obs import rounds

Kind = Literal["attention", "mlp"]
Batch = tuple[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Removal:
    """What goes from one layer: whole kv groups, or query heads (from every kv group as many), and FFN channels."""

    kv_groups: int
    query_heads: int
    channels: int


@dataclass(frozen=True)
class _Half:
    """One output linear and how it is cut. width: units that lie under one kv head, 1 where that does not matter."""

    kind: Kind
    linear: nn.Linear
    groups_ND: Tensor
    sizes: tuple[int, ...]
    width: int = 1


@dataclass(frozen=True)
class Naive:
    """kept: query heads and channels by layer and half. inversions: how many matrices were inverted."""

    kept: dict[tuple[int, Kind], tuple[int, ...]]
    inversions: int


class _Reached(Exception):
    """The forward has come as far as it was wanted."""


@torch.no_grad()
def prune_naive_(
    model: PreTrainedModel,
    input_ids_NL: Tensor,
    removals: Sequence[Removal],
    *,
    dampening_frac: float,
    batch_size: int,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> Naive:
    """Prune in masked form, on the device the model is on; errors are propagated from layer to layer."""
    family, kept, inversions = family_of(model), {}, 0
    layers = family.layers(model)
    batches = [_entering(model, layers[0], ids_BL.to(model.device)) for ids_BL in torch.split(input_ids_NL, batch_size)]
    for index, (layer, removal) in enumerate(zip(layers, removals, strict=True)):
        for half in _halves(family, layer, removal):
            kept_units = _prune_(half, _hessian(layer, half.linear, batches), dampening_frac)
            kept[index, half.kind] = _heads_of(family, layer, half, kept_units)
            inversions += len(half.sizes)
        batches = [(_forward(layer, stream_BLC, kwargs), kwargs) for stream_BLC, kwargs in batches]
        progress((index + 1) / len(layers), f"layer {index + 1} of {len(layers)}")
    return Naive(kept, inversions)


def _halves(family: ModelFamily, layer: nn.Module, removal: Removal) -> list[_Half]:
    """Attention first. One head unit a round."""
    o_proj, down_proj = family.o_proj(layer), family.down_proj(layer)
    kv_heads, query_heads = _num_heads(family, layer)
    units = query_heads if removal.query_heads else kv_heads
    groups_ND = torch.arange(o_proj.in_features).reshape(units, -1)
    each = tuple(rounds.fixed_group_sizes(removal.query_heads or removal.kv_groups, 1))
    channels_ND = torch.arange(down_proj.in_features).unsqueeze(1)
    return [
        _Half("attention", o_proj, groups_ND, each, units // kv_heads),
        _Half("mlp", down_proj, channels_ND, tuple(rounds.halving_group_sizes(removal.channels))),
    ]


def _num_heads(family: ModelFamily, layer: nn.Module) -> tuple[int, int]:
    """Of keys and of queries."""
    head_dim = int(family.attention(layer).head_dim)  # type: ignore[arg-type]
    rows = family.projections(layer)
    return rows["k"].num_rows // head_dim, rows["q"].num_rows // head_dim


def _heads_of(family: ModelFamily, layer: nn.Module, half: _Half, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Kept units as kept query heads; channels are what they are."""
    if half.kind == "mlp":
        return kept
    per_unit = _num_heads(family, layer)[1] // len(half.groups_ND)
    return tuple(unit * per_unit + head for unit in kept for head in range(per_unit))


def _entering(model: PreTrainedModel, first: nn.Module, ids_BL: Tensor) -> Batch:
    """The stream before the first layer, and the arguments that every layer gets."""
    seen: list[Batch] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        stream_BLC = args[0] if args else rest.pop("hidden_states")
        seen.append((stream_BLC, rest))
        raise _Reached

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids_BL, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _forward(layer: nn.Module, stream_BLC: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = layer(stream_BLC, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _hessian(layer: nn.Module, linear: nn.Linear, batches: Sequence[Batch]) -> Tensor:
    """Mean of x xᵀ over all tokens: the whole layer runs, the product is the whole product."""
    sum_II = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
    num_tokens = 0

    def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal num_tokens
        X_TI = args[0].flatten(0, -2).float()
        sum_II.add_(X_TI.T @ X_TI)
        num_tokens += len(X_TI)

    handle = linear.register_forward_pre_hook(add)
    try:
        for stream_BLC, kwargs in batches:
            _forward(layer, stream_BLC, kwargs)
    finally:
        handle.remove()
    return sum_II / num_tokens


def _prune_(half: _Half, H_II: Tensor, dampening_frac: float) -> tuple[int, ...]:
    """Remove groups in the rounds of the half, one inversion each; returns the kept ones."""
    linear, groups_ND = half.linear, half.groups_ND.to(half.linear.weight.device)
    if not half.sizes:
        return tuple(range(len(groups_ND)))
    W_OI, H_II = linear.weight.double(), H_II.double()
    dead_I = H_II.diagonal() == 0
    damp = dampening_frac * H_II.diagonal().mean()
    H_II = H_II + damp * torch.eye(len(H_II), dtype=H_II.dtype, device=H_II.device)
    H_II[dead_I, dead_I] = 1.0
    W_OI[:, dead_I] = 0.0
    live_N = torch.arange(len(groups_ND), device=W_OI.device)
    for size in half.sizes:
        columns_R = groups_ND[live_N].flatten()
        inverse_RR = torch.cholesky_inverse(torch.linalg.cholesky(H_II[columns_R][:, columns_R]))
        W_OR = W_OI @ H_II[:, columns_R] @ inverse_RR
        scores_N = _scores(W_OR, inverse_RR, groups_ND.shape[1])
        if half.width > 1:  # one head of every kv group goes before any group loses a second one
            left_G = torch.bincount(live_N // half.width)
            scores_N[left_G[live_N // half.width] < left_G.max()] = torch.inf
        stays_N = torch.ones(len(live_N), dtype=torch.bool, device=live_N.device)
        stays_N[scores_N.topk(size, largest=False).indices] = False
        live_N = live_N[stays_N]
    columns_R = groups_ND[live_N].flatten()
    solution_RO = torch.linalg.solve(H_II[columns_R][:, columns_R], (W_OI @ H_II[:, columns_R]).T)
    linear.weight.zero_()
    linear.weight[:, columns_R] = solution_RO.T.to(linear.weight)
    return tuple(live_N.tolist())


def _scores(W_OR: Tensor, inverse_RR: Tensor, width: int) -> Tensor:
    """tr(W_G (H⁻¹_GG)⁻¹ W_Gᵀ) of every group of `width` neighbouring columns."""
    if width == 1:
        return W_OR.square().sum(0) / inverse_RR.diagonal()
    scores = []
    for start in range(0, W_OR.shape[1], width):
        group = slice(start, start + width)
        W_DO = W_OR[:, group].T
        scores.append((W_DO * torch.linalg.solve(inverse_RR[group, group], W_DO)).sum())
    return torch.stack(scores)
