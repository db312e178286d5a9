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

from pruning.allocation.budget import Allocation, LayerBudget, removed_parameters
from pruning.allocation.schedule import solve_budgets
from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import Decoder
from pruning.errors import PruningError
from pruning.families import layer_cost, shapes
from pruning.layerwise.kl import final_stream, mean_kl
from pruning.layerwise.prune import prune_layerwise_, sub_layers_to_prune
from pruning.obs.elimination import single_precision_will_do
from pruning.obs.groups import Solver
from pruning.orders import Orders
from pruning.statistics.hessian import Statistics
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import walk_layers
from pruning.walk.state import Pruned, WalkState

Progress = Callable[[float, str], None]

#: calibration tokens per input of the widest linear that suffice to compare splits
_SCOUTING_TOKENS_PER_INPUT = 3
#: held-out tokens that suffice to compare splits: the same ones judge all
_JUDGING_TOKENS = 2048
#: by how much the KL must fall before more of attention is given up. Smaller differences on a few windows of one text
#: do not carry over to another: SmolLM2 at 20 % lost 5 % of KL on C4 and gained 2 % of perplexity on WikiText-2.
_WORTHWHILE_GAIN = 0.1
#: mean share of FFN channels above which a split is not tried if a gentler one is there
_MAX_FFN_RATIO = 0.65


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


def prune_split(job: Job, candidate: Candidate, walk_state: WalkState, progress: Progress) -> Pruned:
    """Solve the budgets and prune once; the weights are in the walk state."""
    if job.statistics is not None:  # nothing is to be judged, so nothing need be computed but the linears themselves
        job = replace(job, calibration=replace(job.calibration, heldout_ids_ML=job.calibration.heldout_ids_ML[:0]))
    pruned, _ = _prune(job, candidate, walk_state, progress)
    return pruned


def prune_best_split(job: Job, candidates: Sequence[Candidate], walk_state: WalkState, progress: Progress) -> Pruned:
    """Prune by the candidate that the held-out KL speaks for; see `choose_split`, also for what it raises."""
    rounds = len(candidates) + 1
    choosing = (rounds - 1) / rounds
    best, tried = choose_split(job, candidates, walk_state, lambda share, message: progress(choosing * share, message))
    if not tried:
        return prune_split(job, best, walk_state, progress)
    pruned = prune_split(job, best, walk_state, _part(progress, rounds - 1, rounds, f"{best.name} won"))
    return pruned.model_copy(update={"split_kl": tried})


def choose_split(
    job: Job, candidates: Sequence[Candidate], walk_state: WalkState, progress: Progress
) -> tuple[Candidate, dict[str, float]]:
    """The candidate that the held-out KL speaks for, and the KL (nats per token) of each that was tried: of none if
    only one is worth it.

    candidates: by rising share of attention. They are tried in this order as long as the KL falls by a tenth; the last
    one for which it did is taken: the KL over that share has one valley. They compete on a part of the calibration
    windows (see `_scouting_set`) and the winner prunes with all. A candidate that cannot reach the sparsity is left
    out, and so is one that would leave little of the FFN while a gentler one is there. PruningError when none can reach
    it, or when there are no held-out windows.
    """
    if not len(job.calibration.heldout_ids_ML):
        raise PruningError(
            "split 'auto' judges by held-out calibration windows and there are none; set calibration.num_heldout to 1 "
            f"or more, or choose a split: {', '.join(candidate.name for candidate in candidates)}"
        )
    candidates = _worth_trying(job.decoder, candidates)
    best, dense_MLC = candidates[0], None
    tried: dict[str, float] = {}
    if len(candidates) == 1:
        return best, tried
    trial = replace(job, calibration=_scouting_set(job))
    for number, candidate in enumerate(candidates):
        branch = walk_state.branch(candidate.name)
        kl = branch.recall("kl")
        if kl is None:
            report = _part(progress, number, len(candidates), candidate.name)
            _, pruned_MLC = _prune(trial, _quick(candidate, trial), branch, report, measured=False)
            if dense_MLC is None:
                dense_MLC = final_stream(job.decoder, trial.calibration.heldout_ids_ML, job.options)
            kl = mean_kl(job.decoder, dense_MLC, pruned_MLC, job.options)
            branch.note("kl", kl)
        tried[candidate.name] = kl
        if candidate is not best and kl > (1 - _WORTHWHILE_GAIN) * tried[best.name]:
            break
        best = candidate
    return best, tried


def _prune(
    job: Job, candidate: Candidate, walk_state: WalkState, progress: Progress, *, measured: bool = True
) -> tuple[Pruned, Tensor]:
    """The outcome, and the stream of the held-out windows after the last layer of the pruned model.

    measured: whether the reports need errors.
    """
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
        heldout_hessians=measured,
        walk_state=walk_state,
    )
    stream_MLC = prune_layerwise_(
        walk,
        widths,
        head_dim,
        budgets,
        candidate.solver,
        walk_state,
        orders=job.orders,
        measured=measured,
        process_group=job.options.process_group,
        on_layer=lambda layer: progress((layer + 1) / len(widths), f"layer {layer + 1} of {len(widths)}"),
    )
    plan = walk_state.plan(widths, head_dim)
    achieved = removed_parameters(budgets, widths, cost, allocation.head_unit) / sum(map(cost.parameters, widths))
    reports = tuple(report for entry in walk_state.entries for report in entry.reports)
    return Pruned(plan=plan, layers=reports, achieved_sparsity=achieved, split=candidate.name), stream_MLC


def _scouting_set(job: Job) -> CalibrationSet:
    """As many of the first windows as the widest Hessian needs, and enough held-out windows to judge.

    Choosing needs less precision than pruning: the splits differ by far more than the windows do.
    """
    calibration = job.calibration
    enough, judges = scouting_counts(_widest(job.decoder), calibration.input_ids_NL.shape[1])
    return replace(
        calibration,
        input_ids_NL=calibration.input_ids_NL[:enough],
        heldout_ids_ML=calibration.heldout_ids_ML[:judges],
    )


def scouting_counts(widest: int, seq_len: int) -> tuple[int, int]:
    """Windows of so many tokens that a trial sees, and held-out ones that judge it. widest: inputs of a linear."""
    return math.ceil(_SCOUTING_TOKENS_PER_INPUT * widest / seq_len), math.ceil(_JUDGING_TOKENS / seq_len)


def _quick(candidate: Candidate, job: Job) -> Candidate:
    """In float32, if the dampening leaves it digits enough to compare by."""
    if not single_precision_will_do(_widest(job.decoder), candidate.solver.dampening_frac):
        return candidate
    return replace(candidate, solver=replace(candidate.solver, dtype=torch.float32))


def _widest(decoder: Decoder) -> int:
    """Inputs of the widest output linear."""
    head_dim = decoder.family.head_dim(decoder.skeleton)
    return max(max(width.intermediate_size, width.num_heads * head_dim) for width in shapes(decoder.skeleton))


def _part(progress: Progress, index: int, count: int, what: str) -> Progress:
    return lambda share, message: progress((index + share) / count, f"split {what}: {message}")


def _worth_trying(decoder: Decoder, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that can reach their sparsity and leave enough of the FFN, asked before hours are spent; of equal layers
    those that come to something else.

    If none leaves enough, those that can reach it at all; the first one's error if none can.
    """
    widths, cost = shapes(decoder.skeleton), layer_cost(decoder.skeleton)
    channels = sum(width.num_channels for width in widths)
    shares: dict[str, float] = {}
    errors: list[PruningError] = []
    known: list[tuple[LayerBudget, ...]] = []
    for candidate in candidates:
        try:
            budgets = solve_budgets(widths, cost, candidate.allocation)
        except PruningError as error:
            errors.append(error)
        else:
            if candidate.allocation.uniform and budgets in known:
                continue  # heads are few: several splits come to the same
            known.append(budgets)
            gone = sum(each.channels * max(1, width.num_experts) for each, width in zip(budgets, widths, strict=True))
            shares[candidate.name] = gone / max(1, channels)
    if not shares:
        raise errors[0]
    gentle = [candidate for candidate in candidates if shares.get(candidate.name, 1.0) <= _MAX_FFN_RATIO]
    return gentle or [candidate for candidate in candidates if candidate.name in shares]
