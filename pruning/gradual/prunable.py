"""Which groups of a model may go, what each costs, and which of them go for a sparsity.

Shapes: N groups of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.allocation.budget import Allocation, LayerBudget, removed_parameters, split_ratios, unit_parameters
from pruning.allocation.schedule import solve_budgets
from pruning.allocation.threshold import LayerScores, Measure, threshold_budgets
from pruning.families import LayerCost, ModelFamily, family_of, layer_cost, shapes
from pruning.families.sites import Site, sites_of
from pruning.gradual.options import check_without_experts
from pruning.layerwise.prune import layer_plan
from pruning.orders import Order
from pruning.plan import LayerPlan, LayerShape, PruningPlan
from pruning.ranking.job import one_of_every_group
from pruning.walk.state import SubLayerReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = Mapping[str, Tensor]
"""By the name of a site, what each of its groups is worth, (N,)."""


@dataclass(frozen=True)
class Prunable:
    """What may go from a model.

    layers: both sites of every layer, whether anything may go from them or not. measure: what one threshold for all
    sites is set on, None to take from every layer what the allocation's curve says; joint: one for heads and channels.
    """

    family: ModelFamily
    widths: tuple[LayerShape, ...]
    cost: LayerCost
    head_dim: int
    layers: tuple[tuple[Site, Site], ...]
    allocation: Allocation
    measure: Measure | None
    joint: bool

    @classmethod
    def of(cls, model: PreTrainedModel, allocation: Allocation, measure: Measure | None, *, joint: bool) -> Prunable:
        """Of a model as it is."""
        family, widths, head_dim = family_of(model), shapes(model), family_of(model).head_dim(model)
        check_without_experts(family)
        layers = []
        for index, shape in enumerate(widths):
            attention, mlp = sites_of(family, index, shape, head_dim, allocation.head_unit)
            layers.append((attention, mlp))
        return cls(family, widths, layer_cost(model), head_dim, tuple(layers), allocation, measure, joint)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Those from which something may go: not protected, not left out by the split, with more than one group."""
        attention, ffn = split_ratios(self.allocation.attention_ratio)
        end = len(self.widths) - self.allocation.protect_last
        return tuple(
            site
            for index, sites in enumerate(self.layers)
            if self.allocation.protect_first <= index < end
            for site in sites
            if site.num_groups > (site.kind == "attention") and (attention if site.kind == "attention" else ffn)
        )

    @property
    def num_parameters(self) -> int:
        """Of all decoder layers."""
        return sum(map(self.cost.parameters, self.widths))

    def share_of(self, site: Site) -> float:
        """What one group of a site is of all decoder-layer parameters."""
        if site.kind == "mlp":
            return self.cost.per_channel / self.num_parameters
        return unit_parameters(site.shape, self.cost, self.allocation.head_unit) / site.at_once / self.num_parameters

    def choose(self, scores: Scores, sparsity: float) -> Choice:
        """What goes for a sparsity: the groups that score least, as far as the allocation lets them.

        scores: of `sites`. Raises PruningError if the sparsity cannot be reached.
        """
        of = {name: values.detach().double().cpu() for name, values in scores.items()}
        orders = {site.name: _order(site, of[site.name]) for site in self.sites}
        allocation = replace(self.allocation, sparsity=sparsity)
        if sparsity < self.allocation.sparsity:  # masks on the way need not lie on a grid
            allocation = replace(allocation, channel_multiple=1, uniform=False)
        budgets: tuple[LayerBudget, ...] = (LayerBudget(0, 0),) * len(self.widths)
        if sparsity > 0 and self.measure is None:
            budgets = solve_budgets(self.widths, self.cost, allocation)
        elif sparsity > 0:
            ranked = [LayerScores(*(_ranked(site, orders, of) for site in sites)) for sites in self.layers]
            # where all must come from one kind, there is no share of the other to keep to
            joint = self.joint or 0 in split_ratios(allocation.attention_ratio)
            budgets = threshold_budgets(
                ranked, self.widths, self.cost, allocation, self.measure or "score", joint=joint
            )
        gone: dict[str, tuple[int, ...]] = {}
        for sites, budget in zip(self.layers, budgets, strict=True):
            for site, units in zip(sites, (budget.head_units, budget.channels), strict=True):
                gone[site.name] = orders[site.name][: units * site.at_once] if units else ()
        removed = removed_parameters(budgets, self.widths, self.cost, allocation.head_unit) / self.num_parameters
        return Choice(self, gone, {name: values.tolist() for name, values in of.items()}, removed)


@dataclass(frozen=True)
class Choice:
    """Which groups go from each site, by its name; scores: by site; sparsity: the share of parameters that goes."""

    prunable: Prunable
    gone: Mapping[str, tuple[int, ...]]
    scores: Mapping[str, list[float]]
    sparsity: float

    def mask(self, site: Site) -> Tensor:
        """0 for the groups that go and 1 for the others, (N,) float32."""
        mask_N = torch.ones(site.num_groups)
        mask_N[list(self.gone[site.name])] = 0
        return mask_N

    @property
    def plan(self) -> PruningPlan:
        """What stays of the model."""
        layers = tuple(self._layer(*sites) for sites in self.prunable.layers)
        return PruningPlan(source=self.prunable.widths, head_dim=self.prunable.head_dim, layers=layers)

    @property
    def reports(self) -> tuple[SubLayerReport, ...]:
        """What each site lost; of errors nothing is known."""
        return tuple(self._report(site) for sites in self.prunable.layers for site in sites if site.num_groups)

    def _layer(self, attention: Site, mlp: Site) -> LayerPlan:
        heads, channels = (
            tuple(group for group in range(site.num_groups) if group not in set(self.gone[site.name]))
            for site in (attention, mlp)
        )
        return layer_plan(attention.layer, attention.shape, heads, channels, self.prunable.allocation.head_unit)

    def _report(self, site: Site) -> SubLayerReport:
        gone = self.gone[site.name]
        report = SubLayerReport(
            layer=site.layer,
            sub_layer=site.kind,
            name=site.name,
            kept=site.num_groups - len(gone),
            total=site.num_groups,
        )
        if not gone:
            return report
        score = sum(self.scores[site.name][group] for group in gone)
        return report.model_copy(update={"predicted_error": None, "measured_error": None, "score": score})


def _order(site: Site, scores_N: Tensor) -> tuple[int, ...]:
    """Groups in the order in which they go."""
    if site.unit == "query_head":
        return one_of_every_group(scores_N.reshape(site.shape.num_kv_heads, site.shape.num_groups)).order
    return Order.of_scores(scores_N.tolist()).order


def _ranked(site: Site, orders: Mapping[str, tuple[int, ...]], scores: Scores) -> tuple[float, ...]:
    if site.name not in orders:
        return ()
    return tuple(scores[site.name][list(orders[site.name])].tolist())
