"""Pruning layer by layer: the meeting of the walk (structure), the budgets (schedule) and OBS (mathematics).

Shapes: O outputs, I inputs of the linear, N groups, D columns per group, K kept columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning import obs
from pruning.families.forward import SubLayerKind
from pruning.ledger import LayerEntry, Ledger, SubLayerReport
from pruning.plan import LayerPlan, LayerShape
from pruning.sequential import SubLayer
from pruning.team import Team

if TYPE_CHECKING:
    from pruning.orders import Orders
    from pruning.schedule import HeadUnit, LayerBudget


@dataclass(frozen=True)
class Solver:
    """The switches of the elimination: see pruning.methods.slimgpt.Config for their meaning and source."""

    dampening_frac: float
    grouped_cholesky: bool
    group_size: int | None
    head_unit: HeadUnit
    dtype: torch.dtype = torch.float64
    """Of the factorisations."""


def prune_layerwise_(
    walk: Generator[SubLayer, None, Tensor],
    shapes: Sequence[LayerShape],
    head_dim: int,
    budgets: Sequence[LayerBudget],
    solver: Solver,
    ledger: Ledger,
    *,
    orders: Orders | None = None,
    measured: bool = True,
    team: Team | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Tensor:
    """Remove what `budgets` say from each linear the walk offers; its weight is changed in place, in masked form.

    The removed columns become zero and the kept ones are compensated. What was decided is entered in the ledger, which
    must be the one the walk writes to. orders: what goes first, found earlier from the same Hessians. measured: False
    leaves measured and held-out errors out of the reports. team: the processes that walk together; the leader solves
    for all. `on_layer` is told each finished layer. Returns what the walk returns: the held-out stream after the last
    layer.
    """
    team = team or Team()
    reports: list[SubLayerReport] = []
    kept: list[tuple[int, ...]] = []
    while True:
        try:
            sub_layer = next(walk)
        except StopIteration as finished:
            if ledger.layers_done:
                on_layer(ledger.layers_done - 1)
            stream_MLC: Tensor = finished.value
            return stream_MLC
        shape, budget = shapes[sub_layer.layer], budgets[sub_layer.layer]
        if sub_layer.kind == "attention":
            if sub_layer.layer:
                on_layer(sub_layer.layer - 1)
            reports, kept = [], []
            groups = head_groups(shape, head_dim, budget.head_units, solver.head_unit)
        else:
            groups = channel_groups(shape, budget.channels, solver)
        kept_units, report = team.decide(lambda: _prune_(sub_layer, groups, solver, orders, measured))  # noqa: B023 (called at once)
        team.copy_from_leader_(sub_layer.linear.weight.data)
        kept.append(kept_units)
        reports.append(report)
        if sub_layer.kind == "mlp":
            plan = _layer_plan(sub_layer.layer, shape, kept[0], kept[1], solver.head_unit)
            ledger.decide(LayerEntry(plan=plan, reports=tuple(reports)))
        del sub_layer  # its Hessian would stay until the next one is there


def sub_layers_to_prune(budgets: Sequence[LayerBudget]) -> Callable[[int, SubLayerKind], bool]:
    """Whether a sub-layer loses anything: the others need no Hessian."""
    return lambda layer, kind: (budgets[layer].head_units if kind == "attention" else budgets[layer].channels) > 0


def _layer_plan(
    index: int, shape: LayerShape, units: tuple[int, ...], channels: tuple[int, ...], head_unit: HeadUnit
) -> LayerPlan:
    per_group = shape.num_groups
    if head_unit == "kv_group":
        kv_heads = units
        query_heads = tuple(g * per_group + h for g in units for h in range(per_group))
    else:
        kv_heads = tuple(range(shape.num_kv_heads))
        query_heads = units
    return LayerPlan(layer=index, kept_query_heads=query_heads, kept_kv_heads=kv_heads, kept_channels=channels)


@dataclass(frozen=True)
class Groups:
    """What may go together. columns_ND: of each group. sizes: groups removed in each round, `count` in all.

    eligible: see obs.eliminate_groups.
    """

    columns_ND: Tensor
    sizes: tuple[int, ...]
    eligible: Callable[[Tensor], Tensor] | None = None

    @property
    def count(self) -> int:
        """How many go."""
        return sum(self.sizes)


def head_groups(shape: LayerShape, head_dim: int, units: int, head_unit: HeadUnit) -> Groups:
    """One unit a round; "query_head": one head of every kv group goes before any group loses a second one."""
    num_columns = shape.num_heads * head_dim
    per_group = shape.num_groups
    if head_unit == "kv_group":
        columns_ND = torch.arange(num_columns).reshape(shape.num_kv_heads, -1)
        return Groups(columns_ND, tuple(obs.fixed_group_sizes(units, 1)))

    def eligible(live_N: Tensor) -> Tensor:
        live_GH = live_N.reshape(-1, per_group)
        left_G = live_GH.sum(1)
        return (live_GH & (left_G == left_G.max()).unsqueeze(1)).flatten()

    columns_ND = torch.arange(num_columns).reshape(shape.num_heads, -1)
    return Groups(columns_ND, tuple(obs.fixed_group_sizes(units * shape.num_kv_heads, 1)), eligible)


def channel_groups(shape: LayerShape, count: int, solver: Solver) -> Groups:
    """Single channels, many a round."""
    columns_ND = torch.arange(shape.intermediate_size).unsqueeze(1)
    if solver.group_size is None:
        return Groups(columns_ND, tuple(obs.halving_group_sizes(count)))
    return Groups(columns_ND, tuple(obs.fixed_group_sizes(count, solver.group_size)))


def _prune_(
    sub_layer: SubLayer, groups: Groups, solver: Solver, orders: Orders | None, measured: bool
) -> tuple[tuple[int, ...], SubLayerReport]:
    """Choose, refit and write back; returns the kept groups (sorted) and the report."""
    start = time.perf_counter()
    total = len(groups.columns_ND)
    report = SubLayerReport(
        layer=sub_layer.layer, sub_layer=sub_layer.kind, name=sub_layer.name, kept=total - groups.count, total=total
    )
    if not groups.count:  # nothing to choose: there need not even be a Hessian
        return tuple(range(total)), report
    assert sub_layer.hessian is not None
    weight_OI = sub_layer.linear.weight.detach()
    if orders is None:
        system, order, found = _solve(sub_layer, groups, solver)
    else:
        system = obs.dampen(
            sub_layer.name, weight_OI, sub_layer.hessian, dampening_frac=solver.dampening_frac, dtype=solver.dtype
        )
        traced = orders.load(sub_layer.name, solver.head_unit if sub_layer.kind == "attention" else "channel")
        order, found = traced.order[: groups.count], {"condition": traced.condition}
    kept_N = torch.ones(total, dtype=torch.bool)
    kept_N[list(order)] = False
    kept_K = groups.columns_ND[kept_N].flatten().to(system.H_II.device)
    refitted_OK = obs.refit(system, kept_K)
    pruned_OI = torch.zeros_like(system.W_OI)
    pruned_OI[:, kept_K] = refitted_OK
    if orders is not None:
        found["predicted_error"] = obs.output_error(system.W_OI, pruned_OI, system.H_II)
    del system
    pruned_OI = pruned_OI.to(weight_OI)
    if measured:
        found |= _measured(sub_layer, weight_OI, pruned_OI)
    sub_layer.linear.weight.data.copy_(pruned_OI)
    return tuple(kept_N.nonzero().flatten().tolist()), report.model_copy(
        update={**found, "num_tokens": sub_layer.hessian.num_tokens, "seconds": time.perf_counter() - start}
    )


def search(problem: obs.Problem, groups: Groups, solver: Solver) -> obs.Elimination:
    """The greedy order in which `groups` go; changes nothing."""
    return obs.eliminate_groups(
        problem,
        groups.columns_ND.to(problem.W_OI.device),
        iter(groups.sizes),
        conditional=solver.grouped_cholesky,
        eligible=groups.eligible,
    )


def _solve(
    sub_layer: SubLayer, groups: Groups, solver: Solver
) -> tuple[obs.System, tuple[int, ...], dict[str, float | None]]:
    """The order of removal by OBS, the system it came from and what was found on the way."""
    assert sub_layer.hessian is not None
    weight_OI = sub_layer.linear.weight.detach()
    problem = obs.prepare(
        sub_layer.name, weight_OI, sub_layer.hessian, dampening_frac=solver.dampening_frac, dtype=solver.dtype
    )
    elimination = search(problem, groups, solver)
    return obs.System(problem.name, problem.W_OI, problem.H_II), elimination.order, {
        "predicted_error": elimination.errors[-1],
        "condition": 1.0 / problem.rcond,
        "refactorisations": elimination.refactorisations,
    }  # fmt: skip


def _measured(sub_layer: SubLayer, weight_OI: Tensor, pruned_OI: Tensor) -> dict[str, float | None]:
    """The errors as the two Hessians see them, in float32: these figures decide nothing."""
    assert sub_layer.hessian is not None
    H_II = sub_layer.hessian.matrix_II
    weight_OI, pruned_OI = weight_OI.to(H_II), pruned_OI.to(H_II)
    return {
        "measured_error": obs.output_error(weight_OI, pruned_OI, H_II),
        "output_energy": obs.output_error(weight_OI, torch.zeros_like(weight_OI), H_II),
        "heldout_error": obs.output_error(weight_OI, pruned_OI, sub_layer.heldout.matrix_II.to(H_II))
        if sub_layer.heldout
        else None,
    }
