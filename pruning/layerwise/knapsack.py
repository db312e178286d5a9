"""One budget of parameters for all heads and channels, spent in steps where the loss minds it least.

Each step measures the model as the steps before have left it: how sensitive the loss is to every sub-layer's output,
and the Hessian of every output linear's inputs, in one walk backwards (`levels`). A knapsack then says how far each
site goes, up to whole sub-layers, and layers of which nothing is left (`allocation.knapsack`). At last the *dense*
weights are refitted in order without all that has gone so far, each layer on the inputs that the pruned layers before
it give: the weights after a step depend on what went, not on the way there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from pruning.allocation.budget import Allocation, HeadUnit, LayerBudget, parameters_left
from pruning.allocation.grid import check_widths, on_grid
from pruning.allocation.knapsack import solve_knapsack
from pruning.allocation.trace import AllocationStep
from pruning.errors import PruningError
from pruning.families import LayerCost, layer_cost, shapes
from pruning.families.forward import KINDS, SubLayerKind, output_name
from pruning.gradients.backward import FORWARDS
from pruning.layerwise.kl import final_stream, mean_kl
from pruning.layerwise.levels import SiteName, TracedSite, Tracing, trace_levels
from pruning.layerwise.prune import prune_layerwise_, sub_layers_to_prune
from pruning.orders import Order, Unit, given_order
from pruning.plan import LayerPlan, LayerShape
from pruning.walk.finished import FinishedDecoder
from pruning.walk.sequential import walk_layers
from pruning.walk.state import LayerEntry, Pruned, SubLayerReport

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.checkpoints.decoder import Decoder
    from pruning.gradients.sensitivity import Labels
    from pruning.layerwise.split_search import Job, Progress
    from pruning.obs.groups import Solver
    from pruning.walk.state import WalkState


@dataclass(frozen=True)
class Knapsack:
    """allocation: its sparsity, protected layers, head unit and channel_multiple. solver: its ridge is that of the
    orders and of the refit. steps: how often is measured anew. labels: of the loss whose gradients are taken.
    step_samples: the first so many calibration windows are all that is looked at before the last refit; None: all."""

    allocation: Allocation
    solver: Solver
    steps: int
    labels: Labels
    step_samples: int | None = None


#: the sub-layers that a layer has
Present = Callable[[int], tuple[SubLayerKind, ...]]


class Removal(BaseModel):
    """Everything that has gone after a step: by linear its heads, kv groups or channels, in the order they went, as the
    dense model numbers them. step: for the report. sensitivities: by linear, of those that could still be cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gone: dict[str, tuple[int, ...]]
    step: AllocationStep
    sensitivities: dict[str, float]

    def load(self, name: str, unit: Unit) -> Order:
        """As `Orders.load`: what goes from a linear, and no more. Its errors say nothing."""
        return given_order(self.gone[name])

    def with_sensitivities(self, entries: Iterable[LayerEntry]) -> tuple[SubLayerReport, ...]:
        """The reports of all layers, with the sensitivities that decided."""
        reports = (report for entry in entries for report in entry.reports)
        return tuple(each.model_copy(update={"sensitivity": self.sensitivities.get(each.name)}) for each in reports)


def prune_by_knapsack(job: Job, knapsack: Knapsack, walk_state: WalkState, progress: Progress) -> Pruned:
    """Choose in steps and prune; the weights are in the walk state.

    A walk state with a folder keeps what each step decided and the layers of the last one: a killed pruning goes on
    with the step where it was. Raises PruningError as `check_knapsack`, or when a Hessian cannot be inverted.
    """
    return KnapsackSteps(job, knapsack, walk_state, progress).run()


def check_knapsack(allocation: Allocation, widths: Sequence[LayerShape], cost: LayerCost) -> None:
    """Raise PruningError if so much cannot go from a model of these layers, or not in such multiples."""
    check_widths(widths, allocation)
    total = sum(map(cost.parameters, widths))
    free = _free(allocation, len(widths))
    most = sum(cost.parameters(shape) - cost.fixed for layer, shape in enumerate(widths) if layer in free)
    if 0 in free and widths[0].num_heads:
        most -= _kept_heads_cost(widths[0], cost, allocation)
    if most < allocation.sparsity * total:
        raise PruningError(
            f"sparsity {allocation.sparsity:g} cannot be reached: with these protected layers at most "
            f"{most / total:.3f} of the decoder-layer parameters can go; lower sparsity or protect fewer layers"
        )


def _kept_heads_cost(shape: LayerShape, cost: LayerCost, allocation: Allocation) -> int:
    """Of the first layer, where one head unit stays: the length of a KV cache is read there."""
    if allocation.head_unit == "kv_group":
        return cost.per_kv_head + shape.num_groups * cost.per_query_head
    return shape.num_kv_heads * (cost.per_query_head + cost.per_kv_head)


def _free(allocation: Allocation, num_layers: int) -> range:
    return range(allocation.protect_first, num_layers - allocation.protect_last)


class KnapsackSteps:
    """One pruning by knapsack. walk_state: keeps what each step decided and, after `run`, the weights."""

    def __init__(self, job: Job, knapsack: Knapsack, walk_state: WalkState, progress: Progress) -> None:
        self._job, self._knapsack, self._main, self._progress = job, knapsack, walk_state, progress
        self._decoder, self._family, self._group = job.decoder, job.decoder.family, job.options.process_group
        self._widths, self._cost = shapes(job.decoder.skeleton), layer_cost(job.decoder.skeleton)
        self._total = sum(map(self._cost.parameters, self._widths))
        names = ([output_name(self._family, layer, kind) for kind in KINDS] for layer in range(len(self._widths)))
        self._names = [(o_proj, down_proj) for o_proj, down_proj in names]
        self._dense_MLC: Tensor | None = None

    def run(self) -> Pruned:
        """Choose in steps and refit without all that goes."""
        removals, steps = self.choose(), self._knapsack.steps
        self._refit(steps, removals[-1], self._main)
        removals[-1] = self._with_kl(steps, removals[-1])
        plan = self._main.plan(self._widths, self._family.head_dim(self._decoder.skeleton))
        return Pruned(
            plan=plan,
            layers=removals[-1].with_sensitivities(self._main.entries),
            achieved_sparsity=1 - self._left(plan.layers) / self._total,
            steps=tuple(removal.step for removal in removals),
        )

    def choose(self) -> list[Removal]:
        """What each of the steps removes, from the first one that is not known; nothing is refitted after the last
        one. Raises PruningError as `prune_by_knapsack`."""
        steps, removals, state = self._knapsack.steps, list[Removal](), self._main
        for number in range(1, steps + 1):
            removal = self._recall(number)
            if removal is None:
                removal = self._decide(number, removals[-1] if removals else None, state)
                self._main.note_text(f"step-{number}", removal.model_dump_json())
                self._group.sum_of(1)  # all have noted it before anyone lets go what it came from
            self._main.discard(f"step-{number - 1}")
            if number < steps and self._recall(number + 1) is None:
                state = self._main.branch(f"step-{number}", keeps_weights=True)
                self._refit(number, removal, state)
            removals.append(self._with_kl(number, removal))
        return removals

    def _with_kl(self, number: int, removal: Removal) -> Removal:
        kl = self._main.recall(f"kl-{number}")
        return removal.model_copy(update={"step": removal.step.model_copy(update={"heldout_kl": kl})})

    def _recall(self, number: int) -> Removal | None:
        text = self._main.recall_text(f"step-{number}")
        return None if text is None else Removal.model_validate_json(text)

    def _decide(self, number: int, before: Removal | None, state: WalkState) -> Removal:
        """Measure the model as the steps before have left it, and spend the budget of this one."""
        knapsack, allocation = self._knapsack, self._knapsack.allocation
        count = len(self._widths)
        plans: list[LayerPlan | None] = [LayerPlan.full(index, shape) for index, shape in enumerate(self._widths)]
        decoder: Decoder = self._decoder
        present: Present = partial(_present, self._widths)
        if before is not None:
            decoder = finished = FinishedDecoder(self._decoder, state)
            present, plans = finished.present, [entry.plan for entry in state.entries]
        nothing = LayerShape(num_heads=0, num_kv_heads=0, intermediate_size=0)
        traced = trace_levels(
            decoder,
            self._job.calibration.input_ids_NL[: knapsack.step_samples],
            Tracing(
                shapes=[plan.shape if plan else nothing for plan in plans],
                cost=self._cost,
                solver=knapsack.solver,
                labels=knapsack.labels,
                free=_free(allocation, count),
                present=present,
            ),
            self._job.options,
            lambda share: self._report(number, 0.75 * share, "sensitivities, layer by layer"),
        )
        wanted = allocation.sparsity * self._total * number / knapsack.steps - (self._total - self._left(plans))
        taken = solve_knapsack({name: site.levels for name, site in traced.items()}, wanted)
        return self._removal(number, before, plans, traced, taken)

    def _removal(
        self,
        number: int,
        before: Removal | None,
        plans: Sequence[LayerPlan | None],
        traced: dict[SiteName, TracedSite],
        taken: dict[SiteName, int],
    ) -> Removal:
        """What the knapsack takes, beside what went before."""
        allocation = self._knapsack.allocation
        nothing: tuple[int, ...] = ()
        gone = dict(before.gone) if before else dict.fromkeys(chain.from_iterable(self._names), nothing)
        orders: dict[str, tuple[int, ...]] = {}
        for (layer, kind), site in traced.items():
            name, plan = self._names[layer][KINDS.index(kind)], plans[layer]
            assert plan is not None, name
            numbers = _numbers(plan, kind, allocation.head_unit)
            orders[name] = tuple(numbers[group] for group in site.order)
            gone[name] += orders[name][: site.groups(taken[layer, kind])]
        if number == self._knapsack.steps and allocation.channel_multiple > 1:
            budgets = on_grid(self.budgets(gone), self._widths, self._cost, allocation)
            for (_, name), budget in zip(self._names, budgets, strict=True):
                others = [channel for channel in orders.get(name, ()) if channel not in gone[name]]
                gone[name] = (*gone[name], *others)[: budget.channels]
        budgets = self.budgets(gone)
        left = parameters_left(budgets, self._widths, self._cost, allocation.head_unit)
        step = AllocationStep(
            sparsity=1 - left / self._total,
            predicted_loss=sum(site.levels.loss_at(taken[name]) for name, site in traced.items()),
            head_units=tuple(budget.head_units for budget in budgets),
            channels=tuple(budget.channels for budget in budgets),
            forwards=FORWARDS + 1,
        )
        sensitivities = {
            self._names[layer][KINDS.index(kind)]: site.sensitivity for (layer, kind), site in traced.items()
        }
        return Removal(gone=gone, step=step, sensitivities=sensitivities)

    def _refit(self, number: int, removal: Removal, state: WalkState) -> None:
        """Walk the dense model in order, each linear without what has gone; the finished layers are in the state."""
        job, last = self._job, number == self._knapsack.steps
        budgets = self.budgets(removal.gone)
        ids_NL, heldout_ML = job.calibration.input_ids_NL, job.calibration.heldout_ids_ML
        if not last:
            ids_NL = ids_NL[: self._knapsack.step_samples]
        walk = walk_layers(
            self._decoder,
            torch.cat([ids_NL, heldout_ML]),
            job.options,
            num_heldout=len(heldout_ML),
            wanted=sub_layers_to_prune(budgets),
            heldout_hessians=last,
            walk_state=state,
        )
        count = len(self._widths)
        pruned_MLC = prune_layerwise_(
            walk,
            self._widths,
            self._family.head_dim(self._decoder.skeleton),
            budgets,
            self._knapsack.solver,
            state,
            orders=removal,
            measured=last,
            process_group=self._group,
            on_layer=lambda layer: self._report(
                number, 0.75 + 0.25 * (layer + 1) / count, f"refit, layer {layer + 1} of {count}"
            ),
        )
        self._group.sum_of(1)  # the leader has written the last layer
        if len(heldout_ML) and self._main.recall(f"kl-{number}") is None:
            if self._dense_MLC is None:
                self._dense_MLC = final_stream(self._decoder, heldout_ML, job.options)
            self._main.note(f"kl-{number}", mean_kl(self._decoder, self._dense_MLC, pruned_MLC, job.options))

    def budgets(self, gone: Mapping[str, tuple[int, ...]]) -> tuple[LayerBudget, ...]:
        """Of each layer, in the units that budgets count."""
        query_heads = self._knapsack.allocation.head_unit == "query_head"
        return tuple(
            LayerBudget(len(gone[o_proj]) // (max(1, shape.num_kv_heads) if query_heads else 1), len(gone[down_proj]))
            for (o_proj, down_proj), shape in zip(self._names, self._widths, strict=True)
        )

    def _left(self, plans: Sequence[LayerPlan | None]) -> int:
        kept = [plan.shape for plan in plans if plan is not None]
        return sum(map(self._cost.parameters, kept))

    def _report(self, number: int, share: float, message: str) -> None:
        steps = self._knapsack.steps
        self._progress((number - 1 + share) / steps, f"step {number} of {steps}: {message}")


def _present(widths: Sequence[LayerShape], layer: int) -> tuple[SubLayerKind, ...]:
    """The sub-layers of a layer of the dense model: an earlier pruning may have taken one."""
    there = {"attention": widths[layer].num_heads, "mlp": widths[layer].intermediate_size}
    return tuple(kind for kind in KINDS if there[kind])


def _numbers(plan: LayerPlan, kind: SubLayerKind, head_unit: HeadUnit) -> tuple[int, ...]:
    """What the dense model calls the groups that a sub-layer still has."""
    if kind == "mlp":
        return plan.kept_channels
    return plan.kept_kv_heads if head_unit == "kv_group" else plan.kept_query_heads
