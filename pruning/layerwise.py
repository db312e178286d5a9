"""Pruning layer by layer: the meeting of the walk (structure), the budgets (schedule) and OBS (mathematics).

Shapes: O outputs, I inputs of the linear, N groups, D columns per group, K kept columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pruning import obs
from pruning.plan import LayerPlan, LayerShape, PruningPlan
from pruning.sequential import SubLayer

if TYPE_CHECKING:
    from pruning.schedule import HeadUnit, LayerBudget


@dataclass(frozen=True)
class Solver:
    """The switches of the elimination: see pruning.methods.slimgpt.Config for their meaning and source."""

    dampening_frac: float
    grouped_cholesky: bool
    group_size: int | None
    head_unit: HeadUnit


class SubLayerReport(BaseModel):
    """What pruning one linear cost.

    predicted_error, measured_error, heldout_error: mean squared output error per token, by the OBS sum (dampened
    Hessian), on the calibration tokens and on held-out tokens; output_energy: the mean squared output itself, of the
    weight as it was, to put the errors in proportion. condition: of the dampened Hessian, estimated in the 1-norm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    sub_layer: str
    name: str
    kept: int
    total: int
    predicted_error: float
    measured_error: float
    output_energy: float
    heldout_error: float | None
    condition: float | None
    num_tokens: int
    seconds: float


def prune_layerwise_(
    sub_layers: Iterable[SubLayer],
    shapes: Sequence[LayerShape],
    head_dim: int,
    budgets: Sequence[LayerBudget],
    solver: Solver,
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> tuple[PruningPlan, tuple[SubLayerReport, ...]]:
    """Remove what `budgets` say from each linear the walk offers; weights are changed in place, in masked form.

    The removed columns become zero and the kept ones are compensated; surgery (shrink_) makes them smaller. Returns
    the plan and a report for each linear. `on_layer` is told each finished layer.
    """
    kept: dict[tuple[int, str], tuple[int, ...]] = {}
    reports: list[SubLayerReport] = []
    for sub_layer in sub_layers:
        shape, budget = shapes[sub_layer.layer], budgets[sub_layer.layer]
        if sub_layer.kind == "attention":
            kept_units, report = _prune_attention_(sub_layer, shape, head_dim, budget.head_units, solver)
        else:
            kept_units, report = _prune_mlp_(sub_layer, budget.channels, solver)
            on_layer(sub_layer.layer)
        kept[sub_layer.layer, sub_layer.kind] = kept_units
        reports.append(report)
    layers = tuple(
        _layer_plan(index, shape, kept[index, "attention"], kept[index, "mlp"], solver.head_unit)
        for index, shape in enumerate(shapes)
    )
    return PruningPlan(source=tuple(shapes), head_dim=head_dim, layers=layers), tuple(reports)


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


def _prune_attention_(
    sub_layer: SubLayer, shape: LayerShape, head_dim: int, units: int, solver: Solver
) -> tuple[tuple[int, ...], SubLayerReport]:
    """One unit a round; "query_head": one head of every kv group goes before any group loses a second one."""
    num_columns = shape.num_heads * head_dim
    per_group = shape.num_groups
    if solver.head_unit == "kv_group":
        columns_ND, count, eligible = torch.arange(num_columns).reshape(shape.num_kv_heads, -1), units, None
    else:
        columns_ND, count = torch.arange(num_columns).reshape(shape.num_heads, -1), units * shape.num_kv_heads

        def eligible(live_N: Tensor) -> Tensor:
            live_GH = live_N.reshape(-1, per_group)
            left_G = live_GH.sum(1)
            return (live_GH & (left_G == left_G.max()).unsqueeze(1)).flatten()

    return _prune_(sub_layer, columns_ND, lambda: obs.fixed_group_sizes(count, 1), count, solver, eligible)


def _prune_mlp_(sub_layer: SubLayer, count: int, solver: Solver) -> tuple[tuple[int, ...], SubLayerReport]:
    columns_ND = torch.arange(sub_layer.linear.in_features).unsqueeze(1)
    if solver.group_size is None:
        return _prune_(sub_layer, columns_ND, lambda: obs.halving_group_sizes(count), count, solver)
    size = solver.group_size
    return _prune_(sub_layer, columns_ND, lambda: obs.fixed_group_sizes(count, size), count, solver)


def _prune_(
    sub_layer: SubLayer,
    columns_ND: Tensor,
    group_sizes: Callable[[], Iterable[int]],
    count: int,
    solver: Solver,
    eligible: Callable[[Tensor], Tensor] | None = None,
) -> tuple[tuple[int, ...], SubLayerReport]:
    """Choose, refit and write back; returns the kept groups (sorted) and the report."""
    start = time.perf_counter()
    weight_OI = sub_layer.linear.weight.detach()
    if not count:  # nothing to choose: the Hessian need not even have an inverse
        return tuple(range(len(columns_ND))), _report(sub_layer, weight_OI, len(columns_ND), len(columns_ND), start)
    problem = obs.prepare(sub_layer.name, weight_OI, sub_layer.hessian, dampening_frac=solver.dampening_frac)
    columns_ND = columns_ND.to(problem.W_OI.device)
    elimination = obs.eliminate_groups(
        problem, columns_ND, iter(group_sizes()), conditional=solver.grouped_cholesky, eligible=eligible
    )
    kept_N = torch.ones(len(columns_ND), dtype=torch.bool, device=columns_ND.device)
    kept_N[list(elimination.order)] = False
    kept_K = columns_ND[kept_N].flatten()
    pruned_OI = torch.zeros_like(problem.W_OI)
    pruned_OI[:, kept_K] = obs.refit(problem, kept_K)
    kept = tuple(kept_N.nonzero().flatten().tolist())
    report = _report(sub_layer, pruned_OI, len(kept), len(columns_ND), start).model_copy(
        update={"predicted_error": elimination.errors[-1], "condition": 1.0 / problem.rcond}
    )
    _write_(sub_layer.linear, pruned_OI)
    return kept, report


def _report(sub_layer: SubLayer, pruned_OI: Tensor, kept: int, total: int, start: float) -> SubLayerReport:
    """The report of a linear before its weight is replaced by `pruned_OI`, in float32: these figures decide nothing."""
    H_II, heldout = sub_layer.hessian.matrix_II, sub_layer.heldout
    W_OI = sub_layer.linear.weight.detach().to(H_II)
    pruned_OI = pruned_OI.to(H_II)
    return SubLayerReport(
        layer=sub_layer.layer,
        sub_layer=sub_layer.kind,
        name=sub_layer.name,
        kept=kept,
        total=total,
        predicted_error=0.0,
        measured_error=obs.output_error(W_OI, pruned_OI, H_II),
        output_energy=obs.output_error(W_OI, torch.zeros_like(W_OI), H_II),
        heldout_error=obs.output_error(W_OI, pruned_OI, heldout.matrix_II.to(H_II)) if heldout else None,
        condition=None,
        num_tokens=sub_layer.hessian.num_tokens,
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def _write_(linear: nn.Linear, weight_OI: Tensor) -> None:
    linear.weight.copy_(weight_OI.to(linear.weight))
