"""What may go together from a linear, in which rounds, and the greedy order in which it goes.

Shapes: O outputs, I inputs of the linear, N groups, D columns per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.families.sites import channel_columns, head_columns
from pruning.obs.elimination import Elimination, Problem, eliminate_groups
from pruning.obs.ridge import Ridge
from pruning.obs.rounds import fixed_group_sizes, halving_group_sizes
from pruning.plan import LayerShape

if TYPE_CHECKING:
    from pruning.allocation.budget import HeadUnit


@dataclass(frozen=True)
class Solver:
    """The switches of the elimination: see pruning.methods.slimgpt.Config for their meaning and source."""

    dampening_frac: float
    grouped_cholesky: bool
    group_size: int | None
    head_unit: HeadUnit
    dtype: torch.dtype = torch.float64
    """Of Hessian, inverse and weight while they are solved."""
    ridge: Ridge = "mean"

    @property
    def own_share(self) -> bool:
        """Whether each input is dampened by a share of its own second moment while what goes is chosen."""
        return self.ridge != "mean"


@dataclass(frozen=True)
class Groups:
    """What may go together. columns_ND: of each group. sizes: groups removed in each round, `count` in all.

    eligible: see elimination.eliminate_groups.
    """

    columns_ND: Tensor
    sizes: tuple[int, ...]
    eligible: Callable[[Tensor], Tensor] | None = None

    @property
    def count(self) -> int:
        """Groups that go in all rounds together."""
        return sum(self.sizes)


def head_groups(shape: LayerShape, head_dim: int, units: int, head_unit: HeadUnit) -> Groups:
    """One unit a round; "query_head": one head of every kv group goes before any group loses a second one."""
    columns_ND, per_group = head_columns(shape, head_dim, head_unit), shape.num_groups
    if head_unit == "kv_group":
        return Groups(columns_ND, tuple(fixed_group_sizes(units, 1)))

    def eligible(live_N: Tensor) -> Tensor:
        live_GH = live_N.reshape(-1, per_group)
        left_G = live_GH.sum(1)
        return (live_GH & (left_G == left_G.max()).unsqueeze(1)).flatten()

    return Groups(columns_ND, tuple(fixed_group_sizes(units * shape.num_kv_heads, 1)), eligible)


def channel_groups(shape: LayerShape, count: int, solver: Solver) -> Groups:
    """Each channel alone is a group; a round takes as many as group_size says, by default half of what is left."""
    columns_ND = channel_columns(shape)
    if solver.group_size is None:
        return Groups(columns_ND, tuple(halving_group_sizes(count)))
    return Groups(columns_ND, tuple(fixed_group_sizes(count, solver.group_size)))


def search(problem: Problem, groups: Groups, solver: Solver, *, uses_up: bool = False) -> Elimination:
    """The greedy order in which `groups` go. uses_up: the problem's inverse is not wanted afterwards."""
    return eliminate_groups(
        problem,
        groups.columns_ND.to(problem.W_OI.device),
        iter(groups.sizes),
        conditional=solver.grouped_cholesky,
        eligible=groups.eligible,
        uses_up=uses_up,
    )
