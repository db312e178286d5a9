"""The walks that fill the database: each is one forward of the calibration windows.

The first one carries out the start, so that its levels are refitted on inputs that pruned layers give, and at every
site removes less and more as well. The second one refits the best point in order, as any other pruning.

Shapes: M held-out samples, L tokens per sample, C residual stream, K kept inputs of a linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from pruning.allocation.budget import LayerBudget, shape_left
from pruning.families import shapes
from pruning.families.sites import channel_columns, head_columns
from pruning.layerwise.prune import groups_to_remove, prune_layerwise_, prune_linear_, where_it_fits
from pruning.obs.elimination import System, dampen, prepare, refit
from pruning.obs.groups import Groups, search
from pruning.obs.rounds import nested_group_sizes
from pruning.orders import Order, Unit, given_order
from pruning.search.database import Level, LevelRecord, columns_of
from pruning.walk.sequential import walk_layers

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.allocation.moves import MovableSite
    from pruning.families.forward import SubLayerKind
    from pruning.layerwise.split_search import Job
    from pruning.obs.groups import Solver
    from pruning.plan import LayerShape
    from pruning.search.database import LevelDatabase
    from pruning.walk.state import SubLayerReport, WalkState
    from pruning.walk.sub_layer import SubLayer


@dataclass(frozen=True)
class _Given:
    """An OrderSource of one site."""

    order: tuple[int, ...]

    def load(self, name: str, unit: Unit) -> Order:
        """What goes from it, and no more."""
        return given_order(self.order)


class Builder:
    """Fills a database with levels of some sites.

    job: its calibration windows are walked. solver: its ridge is that of orders and weights. sites: those that may be
    cut, by layer and kind.
    """

    def __init__(
        self,
        job: Job,
        solver: Solver,
        database: LevelDatabase,
        sites: Sequence[MovableSite],
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> None:
        self._job, self._solver, self._database, self._on_layer = job, solver, database, on_layer
        self._sites = {(site.layer, site.kind): site for site in sites}
        self._widths = shapes(job.decoder.skeleton)
        self._head_dim = job.decoder.family.head_dim(job.decoder.skeleton)

    def levels(
        self, budgets: Sequence[LayerBudget], gone: Mapping[str, tuple[int, ...]] | None, walk_state: WalkState
    ) -> Tensor:
        """Walk with what the budgets remove and save every level of every site under its count.

        gone: by output linear what the budgets mean, in its order; None: what Optimal Brain Surgeon finds. Of what goes
        beyond that it finds the order in any case. Returns the held-out stream after the last layer (M, L, C). Raises
        PruningError when a Hessian cannot be inverted.
        """

        def solve(sub_layer: SubLayer, groups: Groups) -> tuple[tuple[int, ...], SubLayerReport]:
            site = self._sites.get((sub_layer.layer, sub_layer.kind))
            if site is None:
                return prune_linear_(sub_layer, groups, self._solver, None, True)
            start = self._count(sub_layer.kind, budgets[sub_layer.layer])
            prefix = None if gone is None else gone[sub_layer.name]
            labels = {count: str(count) for count in site.counts}
            make = partial(self._levels_of, site=site, groups=groups, start=start, prefix=prefix)
            return self._put_(sub_layer, self._saved(sub_layer, labels, make)[start])

        return self._walk(budgets, walk_state, solve)

    def refit(self, budgets: Sequence[LayerBudget], label: str, walk_state: WalkState) -> Tensor:
        """Walk with the levels in the database that the budgets name, each refitted, and save these under a label.

        Returns and raises as `levels`.
        """

        def solve(sub_layer: SubLayer, groups: Groups) -> tuple[tuple[int, ...], SubLayerReport]:
            if (sub_layer.layer, sub_layer.kind) not in self._sites:
                return prune_linear_(sub_layer, groups, self._solver, None, True)
            count = self._count(sub_layer.kind, budgets[sub_layer.layer])
            order = self._database.load(sub_layer.name, str(count)).record.gone
            make = partial(self._one_level, groups=groups, order=order, count=count)
            return self._put_(sub_layer, self._saved(sub_layer, {count: label}, make)[count])

        return self._walk(budgets, walk_state, solve)

    def _walk(
        self,
        budgets: Sequence[LayerBudget],
        walk_state: WalkState,
        solve: Callable[[SubLayer, Groups], tuple[tuple[int, ...], SubLayerReport]],
    ) -> Tensor:
        calibration = self._job.calibration
        walk = walk_layers(
            self._job.decoder,
            torch.cat([calibration.input_ids_NL, calibration.heldout_ids_ML]),
            self._job.options,
            num_heldout=len(calibration.heldout_ids_ML),
            wanted=lambda layer, kind: (layer, kind) in self._sites,
            walk_state=walk_state,
        )
        return prune_layerwise_(
            walk,
            self._widths,
            self._head_dim,
            budgets,
            self._solver,
            walk_state,
            solve=solve,
            on_layer=self._on_layer,
        )

    def _levels_of(
        self, sub_layer: SubLayer, site: MovableSite, groups: Groups, start: int, prefix: tuple[int, ...] | None
    ) -> dict[int, Level]:
        order = self._order(sub_layer, groups, prefix, start, site.counts[-1])
        return {count: self._level(sub_layer, self._groups(sub_layer, count), order) for count in site.counts}

    def _one_level(self, sub_layer: SubLayer, groups: Groups, order: tuple[int, ...], count: int) -> dict[int, Level]:
        return {count: self._level(sub_layer, groups, order)}

    def _level(self, sub_layer: SubLayer, groups: Groups, order: tuple[int, ...]) -> Level:
        """What is left of a linear without the first groups of the order; the linear itself stays as it is."""
        gone = order[: groups.count]
        own = replace(sub_layer, linear=copy.deepcopy(sub_layer.linear))
        kept, report = prune_linear_(own, groups, self._solver, _Given(gone), True)
        if not gone:
            return Level(LevelRecord(gone=gone, report=report), None)
        weight_OI = own.linear.weight.detach()
        kept_K = columns_of(groups.columns_ND, kept).to(weight_OI.device)
        return Level(LevelRecord(gone=gone, report=report), weight_OI[:, kept_K].cpu())

    def _order(
        self, sub_layer: SubLayer, groups: Groups, prefix: tuple[int, ...] | None, start: int, most: int
    ) -> tuple[int, ...]:
        """In which order groups go until `most` have: first those of the start, then what costs least without them."""
        system = self._system(sub_layer)
        if prefix is None:
            prefix = search(prepare(system), groups, self._solver, uses_up=True).order if groups.count else ()
        if most == start:
            return prefix
        kept = [group for group in range(len(groups.columns_ND)) if group not in set(prefix)]
        rest = self._further_groups(sub_layer, start, most)
        without = _without(system, columns_of(groups.columns_ND, kept)) if prefix else system
        found = search(prepare(without), rest, self._solver, uses_up=True)
        return (*prefix, *(kept[group] for group in found.order))

    def _further_groups(self, sub_layer: SubLayer, start: int, most: int) -> Groups:
        """What may go from the start on, numbered as what is left there; in rounds that hold for every level."""
        kind, solver = sub_layer.kind, self._solver
        shape = shape_left(self._widths[sub_layer.layer], self._budget(kind, start), solver.head_unit)
        rest = groups_to_remove(kind, shape, self._head_dim, self._budget(kind, most - start), solver)
        if kind == "mlp" and solver.group_size is None:
            rest = replace(rest, sizes=tuple(nested_group_sizes(most - start, shape.intermediate_size)))
        return rest

    def _groups(self, sub_layer: SubLayer, count: int) -> Groups:
        shape = self._widths[sub_layer.layer]
        return groups_to_remove(
            sub_layer.kind, shape, self._head_dim, self._budget(sub_layer.kind, count), self._solver
        )

    def _system(self, sub_layer: SubLayer) -> System:
        assert sub_layer.hessian is not None, sub_layer.name
        solver = self._solver
        return dampen(
            sub_layer.name,
            sub_layer.linear.weight.detach(),
            sub_layer.hessian,
            dampening_frac=solver.dampening_frac,
            own_share=solver.own_share,
            dtype=solver.dtype,
            scale_O=sub_layer.output_scale_O,
        )

    def _saved(
        self, sub_layer: SubLayer, labels: Mapping[int, str], make: Callable[[SubLayer], dict[int, Level]]
    ) -> dict[int, Level]:
        """The levels that the leader of the group makes, in every process: each keeps a database of its own. labels: by
        count, under which they are saved."""
        group, made = self._job.options.process_group, dict[int, Level]()

        def records() -> dict[int, tuple[LevelRecord, tuple[int, ...] | None]]:
            made.update(where_it_fits(sub_layer, make))
            sizes = {count: None if each.weight_OK is None else each.weight_OK.shape for count, each in made.items()}
            return {count: (made[count].record, size and tuple(size)) for count, size in sizes.items()}

        weight_OI = sub_layer.linear.weight
        for count, (record, size) in group.decide(records).items():
            weight_OK = None
            if size is not None:
                mine = made[count].weight_OK if count in made else None
                weight_OK = weight_OI.new_empty(size) if mine is None else mine.to(weight_OI.device)
                group.copy_from_leader_(weight_OK)
                weight_OK = weight_OK.cpu()
            made[count] = Level(record, weight_OK)
            self._database.save(sub_layer.name, labels[count], made[count])
        return made

    def _put_(self, sub_layer: SubLayer, level: Level) -> tuple[tuple[int, ...], SubLayerReport]:
        """Let the walk go on with a level."""
        record, kept = level.record, level.record.kept
        if level.weight_OK is not None:
            weight_OI = sub_layer.linear.weight.data
            kept_K = columns_of(self._columns(sub_layer), kept).to(weight_OI.device)
            weight_OI.zero_()
            weight_OI[:, kept_K] = level.weight_OK.to(weight_OI.device)
        return kept, record.report

    def _columns(self, sub_layer: SubLayer) -> Tensor:
        shape: LayerShape = self._widths[sub_layer.layer]
        if sub_layer.kind == "attention":
            return head_columns(shape, self._head_dim, self._solver.head_unit)
        return channel_columns(shape)

    def _budget(self, kind: SubLayerKind, count: int) -> LayerBudget:
        return LayerBudget(count, 0) if kind == "attention" else LayerBudget(0, count)

    def _count(self, kind: SubLayerKind, budget: LayerBudget) -> int:
        return budget.head_units if kind == "attention" else budget.channels


def _without(system: System, kept_K: Tensor) -> System:
    """The system of the kept columns alone, with their refitted weight."""
    kept_K = kept_K.to(system.W_OI.device)
    return replace(
        system,
        W_OI=refit(system, kept_K),
        captured_II=system.captured_II[kept_K][:, kept_K],
        diagonal_I=system.diagonal_I[kept_K],
    )
