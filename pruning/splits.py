"""One allocation carried out, or several tried and the best kept by a measured loss.

Predicted layer errors undervalue attention in models with grouped kv heads, so the split between attention and FFN is
judged by the KL to the dense model's logits on held-out windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pruning.calibration import CalibrationSet
from pruning.divergence import final_stream, mean_kl
from pruning.errors import PruningError
from pruning.families import family_of, layer_cost, shapes
from pruning.layerwise import Solver, prune_layerwise_
from pruning.plan import LayerShape
from pruning.pruned import Pruned
from pruning.schedule import Allocation, removed_parameters, solve_budgets
from pruning.sequential import WalkOptions, walk_layers
from pruning.statistics import captured_sub_layers

Progress = Callable[[float, str], None]

#: calibration tokens per input of the widest linear below which its Hessian says too little to compare splits
_SCOUTING_TOKENS_PER_INPUT = 4


def prune_split_(
    model: nn.Module,
    calibration: CalibrationSet,
    allocation: Allocation,
    solver: Solver,
    statistics: Path | None,
    options: WalkOptions,
    progress: Progress,
) -> Pruned:
    """Solve the budgets and prune once, in masked form."""
    family, widths, cost = family_of(model), shapes(model), layer_cost(model)
    budgets = solve_budgets(widths, cost, allocation)
    if statistics is not None:
        sub_layers = captured_sub_layers(model, statistics, options.device)
    else:
        ids_NL = torch.cat([calibration.input_ids_NL, calibration.heldout_ids_ML])
        sub_layers = walk_layers(model, family, ids_NL, options, num_heldout=len(calibration.heldout_ids_ML))
    plan, reports = prune_layerwise_(
        sub_layers,
        widths,
        family.head_dim(model),
        budgets,
        solver,
        on_layer=lambda layer: progress((layer + 1) / len(widths), f"layer {layer + 1} of {len(widths)}"),
    )
    achieved = removed_parameters(budgets, widths, cost, allocation.head_unit) / sum(map(cost.parameters, widths))
    return Pruned(plan=plan, layers=reports, achieved_sparsity=achieved)


def prune_best_split_(
    model: nn.Module,
    calibration: CalibrationSet,
    candidates: Mapping[str, Allocation],
    solver: Solver,
    statistics: Path | None,
    options: WalkOptions,
    progress: Progress,
) -> Pruned:
    """Prune with each allocation from the same weights; the model keeps the one with the smallest held-out KL.

    With plenty of calibration windows the allocations compete on a part of them (see `_scouting_set`) and the winner is
    pruned again with all. An allocation that cannot reach the sparsity is not a candidate; PruningError when none can,
    or when there are no held-out windows.
    """
    if not len(calibration.heldout_ids_ML):
        raise PruningError(
            "split 'auto' judges by held-out calibration windows and there are none; set calibration.num_heldout to 1 "
            "or more, or choose a split: equal, half, ffn, attention"
        )
    candidates = _reachable(model, candidates)
    family = family_of(model)
    scouting = calibration
    if statistics is None:
        scouting = _scouting_set(calibration, shapes(model), family.head_dim(model))
    dense_MLC = final_stream(model, family, calibration.heldout_ids_ML, options)
    dense = _output_weights(model)
    rounds = len(candidates) + (scouting is not calibration)
    tried: dict[str, float] = {}
    best: tuple[str, Pruned, list[Tensor]] | None = None
    for number, (name, allocation) in enumerate(candidates.items()):
        _restore_(model, dense)
        report = _part(progress, number, rounds, f"split {name}: ")
        pruned = prune_split_(model, scouting, allocation, solver, statistics, options, report)
        pruned_MLC = final_stream(model, family, calibration.heldout_ids_ML, options)
        tried[name] = mean_kl(model, family, dense_MLC, pruned_MLC, options)
        if tried[name] == min(tried.values()):
            best = name, pruned, _output_weights(model)
    assert best is not None
    name, pruned, weights = best
    if scouting is calibration:
        _restore_(model, weights)
    else:
        _restore_(model, dense)
        report = _part(progress, rounds - 1, rounds, f"split {name} won: ")
        pruned = prune_split_(model, calibration, candidates[name], solver, statistics, options, report)
    return pruned.model_copy(update={"split_kl": tried})


def _scouting_set(calibration: CalibrationSet, widths: Sequence[LayerShape], head_dim: int) -> CalibrationSet:
    """The first eighth of the windows, or as many as the widest Hessian needs; all of them if that saves no time.

    Choosing needs less precision than pruning: the splits differ by far more than the windows do.
    """
    num_samples, seq_len = calibration.input_ids_NL.shape
    widest = max(max(width.intermediate_size, width.num_heads * head_dim) for width in widths)
    enough = max(math.ceil(num_samples / 8), math.ceil(_SCOUTING_TOKENS_PER_INPUT * widest / seq_len))
    if 3 * enough >= 2 * num_samples:
        return calibration
    return replace(calibration, input_ids_NL=calibration.input_ids_NL[:enough])


def _part(progress: Progress, index: int, count: int, prefix: str) -> Progress:
    return lambda share, message: progress((index + share) / count, prefix + message)


def _reachable(model: nn.Module, candidates: Mapping[str, Allocation]) -> dict[str, Allocation]:
    """Those that can reach their sparsity, asked before hours are spent; the first one's error if none can."""
    widths, cost = shapes(model), layer_cost(model)
    reachable: dict[str, Allocation] = {}
    errors: list[PruningError] = []
    for name, allocation in candidates.items():
        try:
            solve_budgets(widths, cost, allocation)
        except PruningError as error:
            errors.append(error)
        else:
            reachable[name] = allocation
    if not reachable:
        raise errors[0]
    return reachable


def _outputs(model: nn.Module) -> list[nn.Linear]:
    family = family_of(model)
    return [linear for layer in family.layers(model) for linear in (family.o_proj(layer), family.down_proj(layer))]


def _output_weights(model: nn.Module) -> list[Tensor]:
    return [linear.weight.detach().clone() for linear in _outputs(model)]


@torch.no_grad()
def _restore_(model: nn.Module, weights: list[Tensor]) -> None:
    for linear, weight in zip(_outputs(model), weights, strict=True):
        linear.weight.copy_(weight)
