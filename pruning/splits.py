"""One allocation carried out, or several tried and the best kept by a measured loss.

Predicted layer errors undervalue attention in models with grouped kv heads, so the split between attention and FFN is
judged by the KL to the dense model's logits on held-out windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruning.calibration import CalibrationSet
from pruning.decoder import Decoder
from pruning.divergence import final_stream, mean_kl
from pruning.errors import PruningError
from pruning.families import layer_cost, shapes
from pruning.layerwise import Solver, prune_layerwise_, sub_layers_to_prune
from pruning.ledger import Ledger
from pruning.orders import Orders
from pruning.plan import LayerShape, PruningPlan
from pruning.pruned import Pruned
from pruning.schedule import Allocation, removed_parameters, solve_budgets
from pruning.sequential import WalkOptions, walk_layers
from pruning.statistics import Statistics

Progress = Callable[[float, str], None]

#: calibration tokens per input of the widest linear that suffice to compare splits
_SCOUTING_TOKENS_PER_INPUT = 4


@dataclass(frozen=True)
class Job:
    """What every try has in common.

    statistics: Hessians captured earlier, None to take them on the way. orders: what goes first, found from them.
    """

    decoder: Decoder
    calibration: CalibrationSet
    statistics: Statistics | None
    orders: Orders | None
    options: WalkOptions


@dataclass(frozen=True)
class Candidate:
    """A way to distribute the cut, and the switches to carry it out with."""

    name: str
    allocation: Allocation
    solver: Solver


def prune_split(job: Job, candidate: Candidate, ledger: Ledger, progress: Progress) -> Pruned:
    """Solve the budgets and prune once; the weights are in the ledger."""
    if job.statistics is not None:  # nothing is to be judged, so nothing need be computed but the linears themselves
        job = replace(job, calibration=replace(job.calibration, heldout_ids_ML=job.calibration.heldout_ids_ML[:0]))
    pruned, _ = _prune(job, candidate, ledger, progress)
    return pruned


def prune_best_split(job: Job, candidates: Sequence[Candidate], ledger: Ledger, progress: Progress) -> Pruned:
    """Prune by the candidate with the smallest held-out KL.

    candidates: by rising share of attention. They are tried in this order until one is worse than the one before it:
    the KL over that share has one valley. With plenty of calibration windows they compete on a part of them (see
    `_scouting_set`) and the winner prunes with all. A candidate that cannot reach the sparsity is left out.
    PruningError when none can, or when there are no held-out windows.
    """
    if not len(job.calibration.heldout_ids_ML):
        raise PruningError(
            "split 'auto' judges by held-out calibration windows and there are none; set calibration.num_heldout to 1 "
            "or more, or choose a split: equal, half, third, ffn, attention"
        )
    candidates = _reachable(job.decoder, candidates)
    if len(candidates) == 1:
        return prune_split(job, candidates[0], ledger, progress)
    some_windows = job.calibration if job.statistics else _scouting_set(job.calibration, job.decoder)
    scouting = job if some_windows is job.calibration else replace(job, calibration=some_windows)
    rounds = len(candidates) + (scouting is not job)
    dense_MLC: Tensor | None = None
    tried: dict[str, float] = {}
    tries: dict[str, tuple[Candidate, Pruned, Ledger]] = {}
    for number, candidate in enumerate(candidates):
        branch = ledger.branch(candidate.name, adoptable=scouting is job)
        kl = branch.recall("kl")
        pruned, pruned_MLC = _prune(scouting, candidate, branch, _part(progress, number, rounds, candidate.name))
        if kl is None:
            if dense_MLC is None:
                dense_MLC = final_stream(job.decoder, job.calibration.heldout_ids_ML, job.options)
            kl = mean_kl(job.decoder, dense_MLC, pruned_MLC, job.options)
            branch.note("kl", kl)
        tried[candidate.name] = kl
        tries[candidate.name] = candidate, pruned, branch
        if kl > min(tried.values()):
            break
    candidate, pruned, branch = tries[min(tried, key=lambda name: tried[name])]
    if scouting is job:
        ledger.adopt(branch)
    else:
        pruned = prune_split(job, candidate, ledger, _part(progress, rounds - 1, rounds, f"{candidate.name} won"))
    return pruned.model_copy(update={"split_kl": tried})


def _prune(job: Job, candidate: Candidate, ledger: Ledger, progress: Progress) -> tuple[Pruned, Tensor]:
    """The outcome, and the stream of the held-out windows after the last layer of the pruned model."""
    decoder, allocation = job.decoder, candidate.allocation
    widths, cost = shapes(decoder.skeleton), layer_cost(decoder.skeleton)
    budgets = solve_budgets(widths, cost, allocation)
    head_dim = decoder.family.head_dim(decoder.skeleton)
    walk = walk_layers(
        decoder,
        torch.cat([job.calibration.input_ids_NL, job.calibration.heldout_ids_ML]),
        job.options,
        num_heldout=len(job.calibration.heldout_ids_ML),
        wanted=sub_layers_to_prune(budgets),
        statistics=job.statistics,
        ledger=ledger,
    )
    stream_MLC = prune_layerwise_(
        walk,
        widths,
        head_dim,
        budgets,
        candidate.solver,
        ledger,
        orders=job.orders,
        team=job.options.team,
        on_layer=lambda layer: progress((layer + 1) / len(widths), f"layer {layer + 1} of {len(widths)}"),
    )
    plan = PruningPlan(source=widths, head_dim=head_dim, layers=tuple(entry.plan for entry in ledger.entries))
    achieved = removed_parameters(budgets, widths, cost, allocation.head_unit) / sum(map(cost.parameters, widths))
    reports = tuple(report for entry in ledger.entries for report in entry.reports)
    return Pruned(plan=plan, layers=reports, achieved_sparsity=achieved, split=candidate.name), stream_MLC


def _scouting_set(calibration: CalibrationSet, decoder: Decoder) -> CalibrationSet:
    """As many of the first windows as the widest Hessian needs; all of them if that saves no time.

    Choosing needs less precision than pruning: the splits differ by far more than the windows do.
    """
    widths: Sequence[LayerShape] = shapes(decoder.skeleton)
    head_dim = decoder.family.head_dim(decoder.skeleton)
    num_samples, seq_len = calibration.input_ids_NL.shape
    widest = max(max(width.intermediate_size, width.num_heads * head_dim) for width in widths)
    enough = math.ceil(_SCOUTING_TOKENS_PER_INPUT * widest / seq_len)
    if 3 * enough >= 2 * num_samples:
        return calibration
    return replace(calibration, input_ids_NL=calibration.input_ids_NL[:enough])


def _part(progress: Progress, index: int, count: int, what: str) -> Progress:
    return lambda share, message: progress((index + share) / count, f"split {what}: {message}")


def _reachable(decoder: Decoder, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that can reach their sparsity, asked before hours are spent; the first one's error if none can."""
    widths, cost = shapes(decoder.skeleton), layer_cost(decoder.skeleton)
    reachable: list[Candidate] = []
    errors: list[PruningError] = []
    for candidate in candidates:
        try:
            solve_budgets(widths, cost, candidate.allocation)
        except PruningError as error:
            errors.append(error)
        else:
            reachable.append(candidate)
    if not reachable:
        raise errors[0]
    return reachable
