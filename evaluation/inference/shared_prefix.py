"""Rows that begin alike: what they share is run once, and each row goes on from its keys and values.

The examples of a few-shot task are most of its tokens. Attention is causal, so what follows changes nothing in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORWARD_PASS = 256
"""Tokens that a forward pass costs beside its own, for it takes its time however few it has."""

_COPIED = 8
"""So many tokens of which a layer's keys and values are copied count as much as one that is run."""


@dataclass(frozen=True)
class Group:
    """Rows (indices) of which the first `shared` tokens are the same; 0: rows that are run whole.

    saved: tokens that are not run because those of one row of each batch are.
    """

    rows: tuple[int, ...]
    shared: int
    saved: int = 0


@dataclass
class _Stretch:
    """Rows from `start` on, in alphabetical order, that share so many tokens; groups within it that share more."""

    start: int
    shared: int
    groups: list[Group]


def grouped(
    sequences: Sequence[tuple[int, ...]], most: Sequence[int], rows_per_batch: Callable[[int], int]
) -> list[Group]:
    """Every row in one group, so that the fewest tokens are run: those that gain nothing by sharing in the first.

    most: how many first tokens of each row may be shared. rows_per_batch: how many rows that cost so many tokens each
    are run at once (see `cost`).
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])

    def whole(start: int, stop: int, shared: int) -> Group:
        rows = tuple(order[start:stop])
        longest = max(len(sequences[index]) for index in rows)
        batches = math.ceil(len(rows) / rows_per_batch(cost(longest, shared)))
        return Group(rows, shared, (len(rows) - batches) * shared - batches * _FORWARD_PASS)

    sharing = _sharing([_alike(sequences, most, *pair) for pair in pairwise(order)], whole)
    together = {index for group in sharing for index in group.rows}
    rest = tuple(index for index in range(len(sequences)) if index not in together)
    return [Group(rest, 0), *sharing] if rest else sharing


def cost(length: int, shared: int) -> int:
    """Tokens that a row counts as in its batch: keys and values of what is shared are copied for it, which takes memory
    if little work."""
    return length - shared + shared // _COPIED


def _sharing(alike: Sequence[int], whole: Callable[[int, int, int], Group]) -> list[Group]:
    """The groups that save the most tokens. alike: what each row shares with the next. whole: the group of a stretch.

    Stretches that share as much lie within each other like brackets; each is one group if that saves more than the
    groups within it.
    """
    open_stretches = [_Stretch(0, 0, [])]
    for place, shared in enumerate([*alike, 0]):
        start, inner = place, []
        while open_stretches[-1].shared > shared:
            ended = open_stretches.pop()
            outer = whole(ended.start, place + 1, ended.shared)
            start, inner = ended.start, ended.groups
            if outer.saved > sum(group.saved for group in inner):
                inner = [outer]
            if open_stretches[-1].shared >= shared:
                open_stretches[-1].groups += inner
        if open_stretches[-1].shared < shared:
            open_stretches.append(_Stretch(start, shared, inner))
    return open_stretches[0].groups


def _alike(sequences: Sequence[tuple[int, ...]], most: Sequence[int], one: int, other: int) -> int:
    """How many first tokens two rows may share."""
    limit = min(most[one], most[other])
    pairs = enumerate(zip(sequences[one][:limit], sequences[other][:limit], strict=True))
    return next((place for place, (a, b) in pairs if a != b), limit)


def run_prefix(model: PreTrainedModel, ids_P: Tensor) -> Cache | None:
    """Keys and values of these tokens, with which a batch of any number of rows can go on, as often as one likes.

    None for a model that keeps something else of its past (state-space layers, layers that use another's keys).
    """
    past = DynamicCache()
    model.base_model(input_ids=ids_P[None], past_key_values=past, use_cache=True)
    num_layers = model.config.get_text_config().num_hidden_layers
    plain = [type(layer) is DynamicLayer and layer.get_seq_length() == len(ids_P) for layer in past.layers]
    if len(plain) != num_layers or not all(plain):
        return None
    return Cache(layers=[_Shared(layer.keys, layer.values) for layer in past.layers])


class _Shared(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [1, heads, P, head_dim], put before those of every row of a batch and left as they
    are: a batch takes no memory beyond that of one layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values, then the given ones: [batch, heads, P + length, head_dim] each."""
        rows = key_states.shape[0]
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)
