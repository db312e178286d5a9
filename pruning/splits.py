"""One allocation carried out, or several tried and the best kept by a measured loss.

Predicted layer errors undervalue attention in models with grouped kv heads, so the split between attention and FFN is
judged by the KL to the dense model's logits on held-out windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pruning.calibration import CalibrationSet
from pruning.divergence import final_stream, mean_kl
from pruning.errors import PruningError
from pruning.families import family_of, layer_cost, shapes
from pruning.layerwise import Solver, prune_layerwise_
from pruning.pruned import Pruned
from pruning.schedule import Allocation, removed_parameters, solve_budgets
from pruning.sequential import WalkOptions, walk_layers
from pruning.statistics import captured_sub_layers

Progress = Callable[[float, str], None]


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
    """Prune with each allocation from the same weights; the model keeps the one with the smallest held-out KL."""
    if not len(calibration.heldout_ids_ML):
        raise PruningError(
            "split 'auto' judges by held-out calibration windows and there are none; set calibration.num_heldout to 1 "
            "or more, or choose a split: equal, half, ffn, attention"
        )
    family = family_of(model)
    dense_MLC = final_stream(model, family, calibration.heldout_ids_ML, options)
    dense = _output_weights(model)
    tried: dict[str, float] = {}
    best: tuple[Pruned, list[Tensor]] | None = None
    for number, (name, allocation) in enumerate(candidates.items()):

        def report(share: float, message: str, number: int = number, name: str = name) -> None:
            progress((number + share) / len(candidates), f"split {name}: {message}")

        _restore_(model, dense)
        pruned = prune_split_(model, calibration, allocation, solver, statistics, options, report)
        pruned_MLC = final_stream(model, family, calibration.heldout_ids_ML, options)
        tried[name] = mean_kl(model, family, dense_MLC, pruned_MLC, options)
        if best is None or tried[name] < min(kl for other, kl in tried.items() if other != name):
            best = pruned, _output_weights(model)
    assert best is not None
    _restore_(model, best[1])
    return best[0].model_copy(update={"split_kl": tried})


def _outputs(model: nn.Module) -> list[nn.Linear]:
    family = family_of(model)
    return [linear for layer in family.layers(model) for linear in (family.o_proj(layer), family.down_proj(layer))]


def _output_weights(model: nn.Module) -> list[Tensor]:
    return [linear.weight.detach().clone() for linear in _outputs(model)]


@torch.no_grad()
def _restore_(model: nn.Module, weights: list[Tensor]) -> None:
    for linear, weight in zip(_outputs(model), weights, strict=True):
        linear.weight.copy_(weight)
