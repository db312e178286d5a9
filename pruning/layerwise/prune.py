"""Pruning layer by layer: chooses, refits and reports each linear that the walk yields, as its budget asks.

Shapes: O outputs, I inputs of the linear, N groups, D columns per group, K kept columns.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from pruning.distributed import ProcessGroup
from pruning.errors import memory_for, memory_part
from pruning.families.experts import channel_places
from pruning.families.forward import SubLayerKind
from pruning.obs.elimination import System, dampen, output_error, prepare, refit, removal_error
from pruning.obs.groups import Groups, Solver, channel_groups, head_groups, search
from pruning.obs.ridge import refit_by_heldout
from pruning.plan import LayerPlan, LayerShape
from pruning.statistics.hessian import Hessian
from pruning.walk.state import LayerEntry, SubLayerReport, WalkState
from pruning.walk.sub_layer import SubLayer

if TYPE_CHECKING:
    from pruning.allocation.budget import HeadUnit, LayerBudget
    from pruning.orders import OrderSource

log = logging.getLogger("slimline")

#: relative difference of predicted and refitted error above which a search is doubted. With sums in float32 the two
#: agree to 1e-10, in the worst case that `prepare` lets pass (condition 1e13) to 1e-5.
_TOLERANCE = 1e-2

#: chooses, refits and writes a linear back, in every process of a group: the units that stay (sorted), and the report
Solve = Callable[[SubLayer, Groups], tuple[tuple[int, ...], SubLayerReport]]
Solved = TypeVar("Solved")


def prune_layerwise_(
    walk: Generator[SubLayer, None, Tensor],
    shapes: Sequence[LayerShape],
    head_dim: int,
    budgets: Sequence[LayerBudget],
    solver: Solver,
    walk_state: WalkState,
    *,
    orders: OrderSource | None = None,
    measured: bool = True,
    process_group: ProcessGroup | None = None,
    solve: Solve | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Tensor:
    """Remove what `budgets` say from each linear the walk offers; its weight is changed in place, in masked form.

    The removed columns become zero and the kept ones are compensated; a linear that keeps none adds nothing, and a
    layer of which nothing stays is dropped. walk_state: takes plan and reports of each layer; the one that the walk
    writes to. orders: what goes first, found earlier from the same Hessians. measured:
    False is for a trial: all errors but those of the search are left out of the reports, and where the held-out windows
    are to choose the ridge, that of the search is taken. process_group: the processes that walk together;
    the leader solves for all. solve: does for each linear what is otherwise done with solver, orders, measured and
    process_group; also for those that lose nothing. on_layer: called with each finished layer. Returns what the walk
    returns: the held-out stream after the last layer.
    """
    solve = solve or partial(
        _solve_, solver=solver, orders=orders, measured=measured, process_group=process_group or ProcessGroup()
    )
    reports: list[SubLayerReport] = []
    units: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    while True:
        try:
            sub_layer = next(walk)
        except StopIteration as finished:
            if walk_state.layers_done:
                on_layer(walk_state.layers_done - 1)
            stream_MLC: Tensor = finished.value
            return stream_MLC
        shape, budget = shapes[sub_layer.layer], budgets[sub_layer.layer]
        if sub_layer.kind == "attention":
            if sub_layer.layer:
                on_layer(sub_layer.layer - 1)
            reports, channels = [], ()
        groups = groups_to_remove(sub_layer.kind, shape, head_dim, budget, solver)
        kept_units, report = solve(sub_layer, groups)
        if groups.count and not kept_units:
            _silence_(sub_layer.linear)
        reports.append(report)
        if sub_layer.kind == "attention":
            units = kept_units
            of_heads = layer_plan(sub_layer.layer, shape, units, (), solver.head_unit)
            sub_layer.keep_heads(of_heads.kept_query_heads, of_heads.kept_kv_heads)
        else:
            channels += channel_places(sub_layer.expert or 0, shape.intermediate_size, kept_units)
        if sub_layer.ends_layer:
            left = units or channels
            plan = layer_plan(sub_layer.layer, shape, units, channels, solver.head_unit) if left else None
            walk_state.decide(LayerEntry(plan=plan, reports=tuple(reports)))
        del sub_layer  # its Hessian would stay until the next one is there


def sub_layers_to_prune(budgets: Sequence[LayerBudget]) -> Callable[[int, SubLayerKind], bool]:
    """Whether a sub-layer loses anything: the others need no Hessian."""
    return lambda layer, kind: (budgets[layer].head_units if kind == "attention" else budgets[layer].channels) > 0


def groups_to_remove(
    kind: SubLayerKind, shape: LayerShape, head_dim: int, budget: LayerBudget, solver: Solver
) -> Groups:
    """What may go from a sub-layer of a layer of that shape, in which rounds, until the budget is met."""
    if kind == "attention":
        return head_groups(shape, head_dim, budget.head_units, solver.head_unit)
    return channel_groups(shape, budget.channels, solver)


def layer_plan(
    index: int, shape: LayerShape, units: tuple[int, ...], channels: tuple[int, ...], head_unit: HeadUnit
) -> LayerPlan:
    """The plan of a layer that keeps these head units and channels (of experts counted through)."""
    per_group = shape.num_groups
    if head_unit == "kv_group":
        kv_heads = units
        query_heads = tuple(g * per_group + h for g in units for h in range(per_group))
    else:
        kv_heads = tuple(range(shape.num_kv_heads)) if units else ()
        query_heads = units
    return LayerPlan(
        layer=index,
        kept_query_heads=query_heads,
        kept_kv_heads=kv_heads,
        kept_channels=channels,
        expert_size=shape.intermediate_size if shape.num_experts else 0,
    )


def _silence_(linear: nn.Linear) -> None:
    for parameter in linear.parameters():
        parameter.data.zero_()


def _solve_(
    sub_layer: SubLayer,
    groups: Groups,
    *,
    solver: Solver,
    orders: OrderSource | None,
    measured: bool,
    process_group: ProcessGroup,
) -> tuple[tuple[int, ...], SubLayerReport]:
    """`prune_linear_` by the leader of the group, for all."""
    solved = process_group.decide(
        lambda: where_it_fits(sub_layer, lambda each: prune_linear_(each, groups, solver, orders, measured))
    )
    process_group.copy_from_leader_(sub_layer.linear.weight.data)
    return solved


def where_it_fits(sub_layer: SubLayer, work: Callable[[SubLayer], Solved]) -> Solved:
    """What `work` makes of a sub-layer where its linear is, or on the host where the device has no room for the
    matrices; the linear has the weight that it was given."""
    weight_OI = sub_layer.linear.weight
    try:
        with memory_for("solving"):
            return work(sub_layer)
    except RuntimeError as error:
        if weight_OI.device.type == "cpu" or memory_part(error) != "solving":
            raise
    # outside of the handler, whose traceback would hold the matrices
    torch.get_device_module(weight_OI.device).empty_cache()
    log.warning(
        "%s has no room to solve %s: it is solved on the host, which takes longer; lower "
        "SLIMLINE_DEVICE_ACTIVATION_BUDGET_GIB",
        *(weight_OI.device, sub_layer.name),
    )
    on_host = _on_host(sub_layer)
    found = work(on_host)
    weight_OI.data.copy_(on_host.linear.weight)
    return found


def _on_host(sub_layer: SubLayer) -> SubLayer:
    """Weight, Hessians and scale of a sub-layer on the CPU."""
    weight_OI, scale_O = sub_layer.linear.weight.detach().cpu(), sub_layer.output_scale_O
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    seen, held = (
        None if each is None else Hessian(each.matrix_II.cpu(), each.num_tokens)
        for each in (sub_layer.hessian, sub_layer.heldout)
    )
    scale_O = None if scale_O is None else scale_O.cpu()
    return replace(sub_layer, linear=linear, statistic=seen, heldout=held, output_scale_O=scale_O)


def prune_linear_(
    sub_layer: SubLayer, groups: Groups, solver: Solver, orders: OrderSource | None, measured: bool
) -> tuple[tuple[int, ...], SubLayerReport]:
    """Choose, refit and write back in this process; returns the kept groups (sorted) and the report."""
    start = time.perf_counter()
    total = len(groups.columns_ND)
    report = SubLayerReport(
        layer=sub_layer.layer, sub_layer=sub_layer.kind, name=sub_layer.name, kept=total - groups.count, total=total
    )
    if not groups.count:  # nothing to choose: there need not even be a Hessian
        return tuple(range(total)), report
    assert sub_layer.hessian is not None
    weight_OI = sub_layer.linear.weight.detach()
    system, order, bounds, found = _choose(sub_layer, groups, solver, orders)
    kept_N = torch.ones(total, dtype=torch.bool)
    kept_N[list(order)] = False
    kept_K, removed_G = (groups.columns_ND[mask_N].flatten().to(system.W_OI.device) for mask_N in (kept_N, ~kept_N))
    pruned_OI = torch.zeros_like(system.W_OI)
    pruned_OI[:, kept_K] = refit(system, kept_K)
    if measured:  # trials in float32 are judged by what their weights do, not by predictions
        error = removal_error(system, pruned_OI, removed_G)
        _warn_of_rounding(sub_layer.name, error, bounds)
        found.setdefault("predicted_error", error)
    if solver.ridge == "heldout" and measured:
        assert sub_layer.heldout is not None
        pruned_OI[:, kept_K], found["ridge"] = refit_by_heldout(system, sub_layer.hessian, sub_layer.heldout, kept_K)
    del system
    pruned_OI = pruned_OI.to(weight_OI)
    if measured:
        found |= _measured(sub_layer, weight_OI, pruned_OI)
    sub_layer.linear.weight.data.copy_(pruned_OI)
    return tuple(kept_N.nonzero().flatten().tolist()), report.model_copy(
        update={
            **found,
            "num_tokens": sub_layer.hessian.num_tokens,
            "assumed_tokens": sub_layer.hessian.assumed_tokens,
            "seconds": time.perf_counter() - start,
        }
    )


def _choose(
    sub_layer: SubLayer, groups: Groups, solver: Solver, orders: OrderSource | None
) -> tuple[System, tuple[int, ...], tuple[float, float], dict[str, float | None]]:
    """The linear's system, the groups that go, the bounds of the error that was predicted for this, and its report.

    The bounds are equal where the search stopped at this very number of groups.
    """
    assert sub_layer.hessian is not None
    name, weight_OI, hessian = sub_layer.name, sub_layer.linear.weight.detach(), sub_layer.hessian
    system = dampen(
        name,
        weight_OI,
        hessian,
        dampening_frac=solver.dampening_frac,
        own_share=solver.own_share,
        dtype=solver.dtype,
        scale_O=sub_layer.output_scale_O,
    )
    if orders is not None:
        traced = orders.load(name, solver.head_unit if sub_layer.kind == "attention" else "channel")
        # what scores no error predicts none
        bounds = traced.bounds(groups.count) if traced.condition is not None else (0.0, math.inf)
        return system, traced.order[: groups.count], bounds, {"condition": traced.condition}
    problem = prepare(system)
    found = search(problem, groups, solver, uses_up=True)
    predicted = found.errors[-1]
    report: dict[str, float | None] = {"predicted_error": predicted, "condition": 1.0 / problem.rcond}
    return system, found.order, (predicted, predicted), report


def _warn_of_rounding(name: str, error: float, predicted: tuple[float, float]) -> None:
    """Warn if the refitted weight costs something else than the search predicted: its scores were then rounded.

    No error: the weights are the best for the columns that are kept, only other columns might have been better.
    """
    lowest, highest = predicted
    if not (1 - _TOLERANCE) * lowest <= error <= (1 + _TOLERANCE) * highest:  # also for NaN
        log.warning(
            "pruning %s costs %.6g where %.6g to %.6g were predicted, so rounding may have changed what was chosen; "
            "raise dampening_frac or num_samples",
            *(name, error, lowest, highest),
        )


def _measured(sub_layer: SubLayer, weight_OI: Tensor, pruned_OI: Tensor) -> dict[str, float | None]:
    """The errors as the two Hessians see them, in float32: these figures decide nothing."""
    assert sub_layer.hessian is not None
    H_II = sub_layer.hessian.matrix_II
    weight_OI, pruned_OI = (_counted(sub_layer, each_OI.to(H_II)) for each_OI in (weight_OI, pruned_OI))
    return {
        "measured_error": output_error(weight_OI, pruned_OI, H_II),
        "output_energy": output_error(weight_OI, torch.zeros_like(weight_OI), H_II),
        "heldout_error": output_error(weight_OI, pruned_OI, sub_layer.heldout.matrix_II.to(H_II))
        if sub_layer.heldout
        else None,
    }


def _counted(sub_layer: SubLayer, weight_OI: Tensor) -> Tensor:
    """Each row times how much its output counts in the residual stream, of which the reports speak."""
    scale_O = sub_layer.output_scale_O
    return weight_OI if scale_O is None else weight_OI * scale_O[:, None]
