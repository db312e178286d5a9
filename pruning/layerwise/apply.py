"""Applying orders: what a budget takes from each site goes, and what stays is repaired or left as it is.

Shapes: O outputs, I inputs of an output linear, G columns that go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from pruning.allocation.budget import Allocation, LayerBudget, removed_parameters
from pruning.allocation.schedule import solve_budgets
from pruning.allocation.threshold import LayerScores, Measure, threshold_budgets
from pruning.checkpoints.surgery import give_output_bias_
from pruning.errors import PruningError
from pruning.families import layer_cost, shapes
from pruning.families.experts import channel_places
from pruning.families.forward import KINDS, output_linear
from pruning.families.sites import Site, sites_of
from pruning.layerwise.prune import layer_plan, prune_layerwise_, sub_layers_to_prune
from pruning.obs.groups import Solver
from pruning.orders import Orders
from pruning.walk.sequential import walk_layers
from pruning.walk.state import LayerEntry, Pruned, SubLayerReport, WalkedLayer, WalkState

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.statistics.hessian import Statistics
    from pruning.walk.options import WalkOptions

Repair = Literal["none", "bias", "least_squares"]
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Application:
    """What is done with the orders of heads and channels.

    allocation: how much goes in all, and along which curve. measure: None follows the curve, else one threshold on this
    measure takes its place; joint: one for heads and channels together. repair: "bias" adds to each output linear what
    the columns that went gave on average, "least_squares" refits the columns that stay. dampening_frac: of the refit.
    """

    allocation: Allocation
    measure: Measure | None = None
    joint: bool = True
    repair: Repair = "none"
    dampening_frac: float = 0.01


def prune_by_orders(
    decoder: Decoder,
    orders: Orders,
    application: Application,
    *,
    statistics: Statistics | None,
    options: WalkOptions,
    walk_state: WalkState,
    progress: Progress = lambda share, message: None,
) -> Pruned:
    """Remove what the allocation takes from the orders; the weights are in walk_state, the decoder stays as it was.

    statistics: Hessians of the same model, for the repair "least_squares" alone. Raises PruningError if the sparsity
    cannot be reached.
    """
    widths, cost = shapes(decoder.skeleton), layer_cost(decoder.skeleton)
    total, head_unit = sum(map(cost.parameters, widths)), application.allocation.head_unit
    added = _added_parameters(decoder) if application.repair == "bias" else 0
    budgets = allocate(decoder, orders, application, added)

    def on_layer(layer: int) -> None:
        progress((layer + 1) / len(widths), f"layer {layer + 1} of {len(widths)}")

    if statistics is not None:
        _refit(decoder, orders, budgets, application, statistics, options, walk_state, on_layer)
    else:
        _cut(decoder, orders, budgets, application, options, walk_state, on_layer)
    plan = walk_state.plan(widths, decoder.family.head_dim(decoder.skeleton))
    return Pruned(
        plan=plan.model_copy(update={"output_bias": added > 0}),
        layers=tuple(report for entry in walk_state.entries for report in entry.reports),
        achieved_sparsity=(removed_parameters(budgets, widths, cost, head_unit) - added) / total,
    )


def allocate(decoder: Decoder, orders: Orders, application: Application, added: int = 0) -> tuple[LayerBudget, ...]:
    """How many units go from each site. added: parameters that the repair adds, which are to be removed as well."""
    widths, cost = shapes(decoder.skeleton), layer_cost(decoder.skeleton)
    total, allocation = sum(map(cost.parameters, widths)), application.allocation
    allocation = replace(allocation, sparsity=allocation.sparsity + added / total)
    if application.measure is None:
        return solve_budgets(widths, cost, allocation)
    scores = [_scores(orders, sites) for sites in _sites_by_layer(decoder, application)]
    return threshold_budgets(scores, widths, cost, allocation, application.measure, joint=application.joint)


def _scores(orders: Orders, sites: Sequence[Site]) -> LayerScores:
    """Of the groups of a layer in the order in which they go; of experts those that go together are added up."""
    attention, *mlp = (orders.scores(site.name, site.unit) if site.num_groups else () for site in sites)
    return LayerScores(attention, tuple(map(sum, zip(*mlp, strict=True))) if len(mlp) > 1 else mlp[0])


def _sites_by_layer(decoder: Decoder, application: Application) -> Iterable[tuple[Site, ...]]:
    family, head_dim = decoder.family, decoder.family.head_dim(decoder.skeleton)
    for layer, shape in enumerate(shapes(decoder.skeleton)):
        yield tuple(sites_of(family, layer, shape, head_dim, application.allocation.head_unit))


def _cut(
    decoder: Decoder,
    orders: Orders,
    budgets: Sequence[LayerBudget],
    application: Application,
    options: WalkOptions,
    walk_state: WalkState,
    on_layer: Callable[[int], None],
) -> None:
    """Remove without a walk: each layer is read, cut, perhaps given biases, and handed to the walk state."""
    family, biased = decoder.family, application.repair == "bias"
    for index, sites in enumerate(_sites_by_layer(decoder, application)):
        if index < walk_state.layers_done:
            continue
        layer = decoder.layer(index, options.device)
        if biased:
            give_output_bias_(family, layer)
        heads: tuple[int, ...] = ()
        channels: tuple[int, ...] = ()
        reports: list[SubLayerReport] = []
        for site in sites:
            units = budgets[index].head_units if site.kind == "attention" else budgets[index].channels
            linear = output_linear(family, layer, site.kind, site.expert)
            stay, said = _cut_site_(linear, site, units, orders, biased=biased)
            if site.kind == "attention":
                heads = stay
            else:
                channels += channel_places(site.expert or 0, site.shape.intermediate_size, stay)
            reports.append(said)
        plan = layer_plan(index, sites[0].shape, heads, channels, application.allocation.head_unit)
        walk_state.decide(LayerEntry(plan=plan, reports=tuple(reports)))
        walk_state.layer_done(WalkedLayer(index, layer, family))
        on_layer(index)
        del layer  # before the next one is there


@torch.no_grad()
def _cut_site_(
    linear: nn.Linear, site: Site, units: int, orders: Orders, *, biased: bool
) -> tuple[tuple[int, ...], SubLayerReport]:
    """Zero the columns of the first groups of the order; returns the groups that stay, and the report."""
    started, count = time.perf_counter(), units * site.at_once
    report = SubLayerReport(
        layer=site.layer, sub_layer=site.kind, name=site.name, kept=site.num_groups - count, total=site.num_groups
    )
    if not count:
        return tuple(range(site.num_groups)), report
    order = orders.load(site.name, site.unit)
    gone = set(order.order[:count])
    columns_G = site.columns_ND[sorted(gone)].flatten().to(linear.weight.device)
    if biased:
        given_O = linear.weight[:, columns_G].float() @ orders.load_mean(site.name).to(columns_G.device)[columns_G]
        linear.bias.add_(given_O.to(linear.bias))
    linear.weight[:, columns_G] = 0
    return tuple(group for group in range(site.num_groups) if group not in gone), report.model_copy(
        update={
            "predicted_error": None,
            "measured_error": None,
            "score": order.errors[count - 1],
            "seconds": time.perf_counter() - started,
        }
    )


def _refit(
    decoder: Decoder,
    orders: Orders,
    budgets: Sequence[LayerBudget],
    application: Application,
    statistics: Statistics,
    options: WalkOptions,
    walk_state: WalkState,
    on_layer: Callable[[int], None],
) -> None:
    """Remove in a walk over captured Hessians, from which the columns that stay are refitted."""
    walk = walk_layers(
        decoder,
        torch.empty(0, 1, dtype=torch.int64),
        options,
        wanted=sub_layers_to_prune(budgets),
        statistics=statistics,
        walk_state=walk_state,
    )
    prune_layerwise_(
        walk,
        shapes(decoder.skeleton),
        decoder.family.head_dim(decoder.skeleton),
        budgets,
        Solver(application.dampening_frac, True, None, application.allocation.head_unit),
        walk_state,
        orders=orders,
        process_group=options.process_group,
        on_layer=on_layer,
    )


def _added_parameters(decoder: Decoder) -> int:
    """Parameters of the biases that output linears do not have yet."""
    family = decoder.family
    layers = family.layers(decoder.skeleton)
    if any(family.has_experts(layer) for layer in layers):
        raise PruningError(
            f"repair bias gives every output linear a bias, and the experts of a {family.name} model have none: set "
            "repair to none or least_squares"
        )
    linears = [output_linear(family, layer, kind) for layer in layers for kind in KINDS]
    return sum(linear.out_features for linear in linears if linear.bias is None)
