"""SlimGPT: layer-wise structured pruning by batched greedy Optimal Brain Surgeon (arXiv 2412.18110).

Config field names and defaults follow the paper; where we differ the field says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from pruning.errors import PruningError

if TYPE_CHECKING:
    from torch import nn

    from pruning.calibration import CalibrationSet
    from pruning.pruned import Pruned
    from pruning.schedule import Allocation
    from pruning.sequential import WalkOptions

VERSION = 1

#: attention ratio over FFN ratio in one layer, by the name of the split
_SPLITS = {"equal": 1.0, "half": 0.5, "ffn": 0.0, "attention": math.inf}
_AUTO_CANDIDATES = ("equal", "half", "ffn")


class Config(BaseModel):
    """What SlimGPT is asked to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(gt=0, lt=1)
    """Share of all decoder-layer parameters to remove."""
    curve: Literal["log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease"] = "log_increase"
    """Incremental Pruning Ratio over depth (section 3.4)."""
    start_over_end: float = Field(default=0.25, gt=0, le=1)
    """First layer's ratio over the last one's; 0.25 is the paper's 0.0625 / 0.25 at 20 %."""
    split: Literal["auto", "equal", "half", "ffn", "attention"] | None = None
    """Attention against FFN: equal ratios as in the paper; half the ratio for attention; one of the two alone; or auto:
    those of equal, half and ffn that reach the sparsity are tried and the smallest KL to the dense logits on the
    held-out windows wins. Default: auto for models with grouped kv heads, equal (the paper's) for those without."""
    head_unit: Literal["kv_group", "query_head"] = "kv_group"
    """With grouped kv heads (not in the paper): whole kv groups, or the same number of query heads from every group."""
    propagate_error: bool = True
    """Hessians from the outputs of already pruned layers (the paper), or all from the dense model (one capture for
    every sparsity)."""
    grouped_cholesky: bool = True
    """False: the "-GCD" ablation (section 3.2)."""
    group_size: PositiveInt | None = None
    """FFN channels removed per round; default: half of what is to go, at most 1024, at least 8 (dynamic group size,
    section 3.2). A number: the "-DGS" ablation."""
    dampening_frac: float = Field(default=0.01, gt=0)
    """Added to the diagonal of each Hessian, as a share of its mean."""
    protect_first: NonNegativeInt = 0
    """Layers at the start that are left whole."""
    protect_last: NonNegativeInt = 0
    """Layers at the end that are left whole."""


def needs_statistics(config: Config) -> bool:
    """Whether `prune` wants a capture of the dense model's Hessians instead of walking the model itself."""
    return not config.propagate_error


def prune(
    model: nn.Module,
    calibration: CalibrationSet,
    config: Config,
    *,
    statistics: Path | None = None,
    options: WalkOptions,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> Pruned:
    """Prune in masked form: removed columns of o_proj and down_proj become zero, kept ones are compensated in place.

    statistics: folder of a capture if `needs_statistics(config)`, else None. Raises PruningError when the two disagree,
    the sparsity cannot be reached, a Hessian cannot be inverted, or auto has no held-out windows to judge by.
    """
    from pruning.layerwise import Solver
    from pruning.splits import prune_best_split_, prune_split_

    _check_statistics(statistics, config)
    _check_head_unit(model, config)
    solver = Solver(config.dampening_frac, config.grouped_cholesky, config.group_size, config.head_unit)
    candidates = {name: _allocation(config, name) for name in _candidates(model, config)}
    if len(candidates) > 1:
        return prune_best_split_(model, calibration, candidates, solver, statistics, options, progress)
    (allocation,) = candidates.values()
    return prune_split_(model, calibration, allocation, solver, statistics, options, progress)


def _check_statistics(statistics: Path | None, config: Config) -> None:
    if needs_statistics(config) and statistics is None:
        raise PruningError("propagate_error false needs statistics: the folder that capture_statistics wrote")
    if not needs_statistics(config) and statistics is not None:
        raise PruningError(
            "propagate_error true takes no statistics, it walks the model itself; leave them out or set it to false"
        )


def _check_head_unit(model: nn.Module, config: Config) -> None:
    from pruning.families import shapes

    if config.head_unit == "query_head" and any(shape.num_groups == 1 for shape in shapes(model)):
        raise PruningError(
            "head_unit 'query_head' takes query heads from groups that share a kv head, and a layer of this model has "
            "one query head per kv head; use kv_group, which there means single heads"
        )


def _candidates(model: nn.Module, config: Config) -> tuple[str, ...]:
    from pruning.families import shapes

    split = config.split or ("auto" if any(shape.num_groups > 1 for shape in shapes(model)) else "equal")
    return _AUTO_CANDIDATES if split == "auto" else (split,)


def _allocation(config: Config, split: str) -> Allocation:
    from pruning.schedule import Allocation

    return Allocation(
        sparsity=config.sparsity,
        curve=config.curve,
        start_over_end=config.start_over_end,
        attention_ratio=_SPLITS[split],
        protect_first=config.protect_first,
        protect_last=config.protect_last,
        head_unit=config.head_unit,
    )
