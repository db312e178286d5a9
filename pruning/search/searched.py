"""SlimGPT by a search over levels: from what a curve or a knapsack gives, towards the least KL to the dense logits.

One walk carries out the start and keeps the repaired output linears of every site at a few levels (`building`); after
that a candidate is a choice of levels and costs one forward of the held-out calibration windows (EvoPress, arXiv
2410.14649; DarwinLM, arXiv 2502.07780, keeps such a database for heads and channels). The best candidate is refitted in
order, and of it, as it was judged and as it is refitted, the one with the lower KL is written: never worse on those
windows than the start. Evaluation data are not seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from pruning.allocation.budget import Allocation, LayerBudget
from pruning.allocation.moves import Point, SearchSpace
from pruning.allocation.schedule import solve_budgets
from pruning.allocation.trace import AllocationStep, SearchTrial, search_curves
from pruning.families import layer_cost, shapes
from pruning.families.forward import output_name
from pruning.layerwise.kl import final_stream, mean_kl
from pruning.layerwise.knapsack import Knapsack, KnapsackSteps, Removal
from pruning.layerwise.split_search import choose_split
from pruning.search.building import Builder
from pruning.search.coordinate import search_by_coordinates
from pruning.search.database import CandidateDecoder, LevelDatabase
from pruning.search.evolution import search_by_evolution
from pruning.search.forwards import OTHERS, forwards_of_knapsack, forwards_of_splits
from pruning.search.judging import Judge, OutOfForwards, Windows
from pruning.walk.state import LayerEntry, Pruned, WalkedLayer

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.allocation.moves import MovableSite
    from pruning.layerwise.split_search import Candidate, Job, Progress
    from pruning.obs.groups import Solver
    from pruning.walk.state import WalkState

_SEARCHES = {"coordinate": search_by_coordinates, "evolution": search_by_evolution}
#: share of the held-out windows that gives a first impression
_FEW = 4
_REFIT = "refit"
#: shares of the time, about: start, database, candidates; the rest is refit and writing
_SHARES = (0.4, 0.6, 0.9)


@dataclass(frozen=True)
class Search:
    """How to search. kind: see `coordinate` and `evolution`. forwards: of the whole pruning. levels: on either side of
    the start of a site. level_size: share of an FFN's channels that one is about. seed: of what is drawn."""

    kind: Literal["coordinate", "evolution"]
    forwards: int
    levels: int
    level_size: float
    seed: int


class _Found(BaseModel):
    """What a search came to. labels: by output linear the level in the database that is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: tuple[SearchTrial, ...]
    labels: dict[str, str]


@dataclass(frozen=True)
class _Start:
    """Where the search begins. gone: by output linear, if that is known yet. forwards: that it took."""

    budgets: tuple[LayerBudget, ...]
    allocation: Allocation
    solver: Solver
    forwards: int
    gone: Mapping[str, tuple[int, ...]] | None = None
    removal: Removal | None = None
    steps: tuple[AllocationStep, ...] = ()
    split: str | None = None
    split_kl: dict[str, float] = field(default_factory=dict)


def prune_by_search(
    job: Job, start: Knapsack | Sequence[Candidate], search: Search, walk_state: WalkState, progress: Progress
) -> Pruned:
    """Search for levels and prune; the weights are in the walk state.

    start: a knapsack, or splits of a curve as for `choose_split`. A walk state with a folder keeps what was decided and
    the database: a killed pruning goes on at the layer or the candidate where it was. Raises PruningError when the
    sparsity cannot be reached, a Hessian cannot be inverted, or a KL is not finite.
    """
    return _Searched(job, search, walk_state, progress).run(start)


class _Searched:
    """One pruning by search."""

    def __init__(self, job: Job, search: Search, walk_state: WalkState, progress: Progress) -> None:
        self._job, self._search, self._main, self._progress = job, search, walk_state, progress
        self._decoder, self._group = job.decoder, job.options.process_group
        self._widths, self._cost = shapes(job.decoder.skeleton), layer_cost(job.decoder.skeleton)
        self._heldout_ML = job.calibration.heldout_ids_ML
        self._filling, self._refitting = walk_state.branch("levels"), walk_state.branch(_REFIT)
        folder = self._filling.folder
        self._database = LevelDatabase(folder and folder / "database")
        self._dense: dict[bool, Tensor] = {}

    def run(self, start: Knapsack | Sequence[Candidate]) -> Pruned:
        """From the start to the written layers; what is known of it is not done again."""
        began = self._start(start)
        space = SearchSpace(
            began.budgets,
            self._widths,
            self._cost,
            began.allocation,
            levels=self._search.levels,
            level_size=self._search.level_size,
        )
        text = self._main.recall_text("searched")
        found = self._found(began, space) if text is None else _Found.model_validate_json(text)
        if text is None:
            self._main.note_text("searched", found.model_dump_json())
        self._write(found, began.solver)
        plan = self._main.plan(self._widths, self._decoder.family.head_dim(self._decoder.skeleton))
        total = sum(map(self._cost.parameters, self._widths))
        reports = tuple(report for entry in self._main.entries for report in entry.reports)
        begun = {"heldout_kl": found.trials[0].heldout_kl}
        return Pruned(
            plan=plan,
            layers=began.removal.with_sensitivities(self._main.entries) if began.removal else reports,
            achieved_sparsity=1 - sum(map(self._cost.parameters, plan.shapes)) / total,
            split=began.split,
            split_kl=began.split_kl,
            steps=(*began.steps[:-1], *(step.model_copy(update=begun) for step in began.steps[-1:])),
            search=found.trials,
            curves=search_curves(found.trials),
        )

    def _start(self, start: Knapsack | Sequence[Candidate]) -> _Start:
        if isinstance(start, Knapsack):
            steps = KnapsackSteps(self._job, start, self._main, self._part(0, _SHARES[0], "start"))
            removals = steps.choose()
            return _Start(
                steps.budgets(removals[-1].gone),
                start.allocation,
                start.solver,
                forwards_of_knapsack(start.steps),
                removals[-1].gone,
                removals[-1],
                tuple(removal.step for removal in removals),
            )
        best, tried = start[0], dict[str, float]()
        if len(start) > 1:
            best, tried = choose_split(self._job, start, self._main, self._part(0, _SHARES[0], "start"))
        return _Start(
            solve_budgets(self._widths, self._cost, best.allocation),
            best.allocation,
            best.solver,
            forwards_of_splits(len(tried)),
            split=best.name,
            split_kl=tried,
        )

    def _found(self, start: _Start, space: SearchSpace) -> _Found:
        """Fill the database, search, and refit the best point if it is another one than the start."""
        judge = self._judge(start, space)
        with suppress(OutOfForwards):
            _SEARCHES[self._search.kind](space, judge, random.Random(self._search.seed))
        trials, labels = judge.trials, self._labels(space, judge.best)
        if judge.best != space.start:
            kl = self._kl_of_walk(_REFIT, lambda: self._refit(start, space, judge.best))
            last = judge.trials[-1]
            trials = [
                *judge.trials,
                SearchTrial(
                    number=len(trials),
                    kind="refit",
                    forwards=last.forwards + 1,
                    windows=judge.windows.all,
                    heldout_kl=kl,
                    accepted=kl <= judge.kl,
                ),
            ]
            if kl <= judge.kl:
                labels = dict.fromkeys(labels, _REFIT)
        return _Found(trials=tuple(trials), labels=labels)

    def _judge(self, start: _Start, space: SearchSpace) -> Judge:
        """At the start, whose KL the walk that fills the database tells."""
        builder = self._builder(start.solver, space, _SHARES[0], _SHARES[1], "database")
        start_kl = self._kl_of_walk("levels", lambda: builder.levels(start.budgets, start.gone, self._filling))
        count = len(self._heldout_ML)
        return Judge(
            space.start,
            start_kl,
            lambda number, point, *, few: self._measure(number, self._labels(space, point), start, few=few),
            lambda one, other: self._moves(space, one, other),
            windows=Windows(count, count // _FEW or None),
            spent=start.forwards + OTHERS - 1,
            forwards=self._search.forwards - 1,  # one is left for the last refit
        )

    def _refit(self, start: _Start, space: SearchSpace, point: Point) -> Tensor:
        builder = self._builder(start.solver, space, _SHARES[2], 1.0, "refit")
        return builder.refit(space.budgets_at(point), _REFIT, self._refitting)

    def _write(self, found: _Found, solver: Solver) -> None:
        """Give the walk state the layers that were found, without a forward; then the database is not needed."""
        decoder = CandidateDecoder(self._decoder, self._database, found.labels, solver.head_unit)
        for index in range(self._main.layers_done, decoder.num_layers):
            layer, plan, reports = decoder.layer_with_plan(index, self._job.options.device)
            self._main.decide(LayerEntry(plan=plan, reports=reports))
            self._main.layer_done(WalkedLayer(index, layer if plan else None, decoder.family))
            del layer  # before the next one is there
        self._main.flush()
        self._group.sum_of(1)  # all have written before anyone lets go what it came from
        for name in ("levels", _REFIT):
            self._main.discard(name)
        self._progress(1.0, "written")

    def _measure(self, number: int, labels: Mapping[str, str], start: _Start, *, few: bool) -> float:
        """The KL of one candidate: noted, or measured by a forward."""
        name = f"candidate-{number}"
        kl = self._main.recall(name)
        if kl is None:
            decoder = CandidateDecoder(self._decoder, self._database, labels, start.solver.head_unit)
            stream_MLC = final_stream(decoder, self._judging(few), self._job.options)
            kl = mean_kl(self._decoder, self._dense_stream(few), stream_MLC, self._job.options)
            self._main.note(name, kl)
        most = self._search.forwards - start.forwards - OTHERS
        self._part(*_SHARES[1:], "search")(min(1.0, number / most), f"candidate {number}, KL {kl:.4g}")
        return kl

    def _kl_of_walk(self, name: str, walk: Callable[[], Tensor]) -> float:
        """Of the held-out stream that a walk gives: noted, or measured. Then the walk is over in all processes."""
        kl = self._main.recall(f"kl-{name}")
        if kl is None:
            stream_MLC = walk()
            kl = mean_kl(self._decoder, self._dense_stream(few=False), stream_MLC, self._job.options)
            self._main.note(f"kl-{name}", kl)
        return kl

    def _judging(self, few: bool) -> Tensor:
        return self._heldout_ML[: len(self._heldout_ML) // _FEW] if few else self._heldout_ML

    def _dense_stream(self, few: bool) -> Tensor:
        """Of the dense model, of this process's judging windows."""
        if few not in self._dense:
            self._dense[few] = final_stream(self._decoder, self._judging(few), self._job.options)
        return self._dense[few]

    def _builder(self, solver: Solver, space: SearchSpace, begin: float, end: float, what: str) -> Builder:
        count, report = self._decoder.num_layers, self._part(begin, end, what)
        return Builder(
            self._job,
            solver,
            self._database,
            space.sites,
            lambda layer: report((layer + 1) / count, f"layer {layer + 1} of {count}"),
        )

    def _part(self, begin: float, end: float, what: str) -> Progress:
        return lambda share, message: self._progress(begin + (end - begin) * share, f"{what}: {message}")

    def _labels(self, space: SearchSpace, point: Point) -> dict[str, str]:
        return {self._name(site): str(site.counts[level]) for site, level in zip(space.sites, point, strict=True)}

    def _moves(self, space: SearchSpace, before: Point, after: Point) -> dict[str, int]:
        changes = {
            self._name(site): site.counts[new] - site.counts[old]
            for site, old, new in zip(space.sites, before, after, strict=True)
        }
        return {name: change for name, change in changes.items() if change}

    def _name(self, site: MovableSite) -> str:
        return output_name(self._decoder.family, site.layer, site.kind)
