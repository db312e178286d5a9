"""SlimGPT: layer-wise structured pruning by batched greedy Optimal Brain Surgeon (arXiv 2412.18110).

Config field names and defaults follow the paper; where we differ the field says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pruning.allocation.options import AllocationOptions
from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError

if TYPE_CHECKING:
    from pruning.allocation.budget import HeadUnit
    from pruning.calibration import CalibrationSet
    from pruning.checkpoints.decoder import Decoder
    from pruning.costs.work import DecoderSize, Windows, Work
    from pruning.families import LayerCost, ModelFamily
    from pruning.layerwise.knapsack import Knapsack
    from pruning.layerwise.split_search import Candidate
    from pruning.plan import LayerShape
    from pruning.search.searched import Search
    from pruning.walk.options import WalkOptions
    from pruning.walk.state import Pruned, WalkState

VERSION = 2
#: what `order` reads
ORDERS_FROM = "statistics"

#: what auto chooses from, by rising share of attention
_AUTO_SPLITS = ("ffn", "third", "half", "equal")


class Config(AllocationOptions):
    """The options of SlimGPT; all of them enter the cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: Real = Field(gt=0, lt=1)
    """Share of all decoder-layer parameters to remove."""
    curve: Literal["log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease"] = "log_increase"
    """Incremental Pruning Ratio over depth (section 3.4)."""
    start_over_end: Real = Field(default=0.25, gt=0, le=1)
    """First layer's ratio over the last one's; 0.25 is the paper's 0.0625 / 0.25 at 20 %."""
    end_points: tuple[Real, Real] | None = None
    """Ratios of the first and of the last layer, taken as they are (the paper at 20 %: 0.0625, 0.25); default: solved
    so that the sparsity is met."""
    split: Literal["auto", "equal", "half", "third", "ffn", "attention"] | None = None
    """Attention against FFN: equal ratios as in the paper; half or a third of the ratio for attention; one of the two
    alone; or auto: ffn, third, half and equal are tried in this order as long as the KL to the dense logits on the
    held-out windows falls by a tenth. Default: auto for models with grouped kv heads, else equal (the paper's)."""
    head_unit: Literal["kv_group", "query_head"] | None = None
    """With grouped kv heads (not in the paper): whole kv groups, or the same number of query heads from every group.
    Default: query_head where the split is auto, kv_group elsewhere (without groups these are single heads)."""
    propagate_error: bool = True
    """Hessians from the outputs of already pruned layers (the paper), or all from the dense model (one capture for
    every sparsity)."""
    grouped_cholesky: bool = True
    """False: the "-GCD" ablation (section 3.2)."""
    group_size: Count | None = None
    """FFN channels removed per round; default: half of what is to go, at most 1024, at least 8 (dynamic group size,
    section 3.2). A number: the "-DGS" ablation."""
    dampening_frac: Real = Field(default=0.01, gt=0, le=1e6)
    """Added to the diagonal of each Hessian, as a share of its mean, or of what ridge says."""
    ridge: Literal["mean", "diagonal", "heldout"] = Field(default="mean", exclude_if=lambda ridge: ridge == "mean")
    """mean: as the paper. diagonal: dampening_frac is a share of each input's own second moment (not in the paper; 0.1
    does well). heldout: diagonal while what goes is chosen, and each linear is refitted with the share that errs least
    on the held-out windows."""
    protect_first: Amount = 0
    """Layers at the start that are left whole."""
    protect_last: Amount = 0
    """Layers at the end that are left whole."""
    channel_multiple: Count = Field(default=1, le=1024, exclude_if=lambda multiple: multiple == 1)
    """What stays of every FFN is a multiple of this, such as 64 or 128: odd widths lose the fast kernels. What one
    layer is rounded by the next ones make up for."""
    uniform: bool = Field(default=False, exclude_if=lambda uniform: not uniform)
    """Every layer keeps the same heads and channels, in numbers that transformers' own class builds: vLLM, SGLang, TGI
    and llama.cpp load what comes out. No curve then plays a part."""


def check_calibration(config: Config, num_heldout: int) -> None:
    """Raise PruningError if calibration lacks what the config judges by."""
    if config.ridge == "heldout" and not num_heldout:
        raise PruningError(
            "ridge 'heldout' is chosen by held-out calibration windows and there are none; set calibration.num_heldout "
            "to 1 or more, or ridge to mean or diagonal"
        )
    if config.allocation == "searched" and not num_heldout:
        raise PruningError(
            "allocation 'searched' judges by held-out calibration windows and there are none; set "
            "calibration.num_heldout to 1 or more, or allocation to knapsack or curve"
        )


def between_steps(config: Config, num_layers: int, num_samples: int, seq_len: int) -> tuple[int, int]:
    """What a pruning that measures anew keeps while it does: values of the residual stream (tokens x streams) of a walk
    backwards, and models."""
    # a search keeps output linears, half of a layer's weights at most, at each level and refitted
    models = config.levels + 1 if config.allocation == "searched" else 0
    if not config.steps_first:
        return 0, models
    # the streams before each layer and after the last, and the gradients at both ends of a layer
    tokens = min(config.step_samples or num_samples, num_samples) * seq_len
    return (num_layers + 3) * tokens, int(config.steps > 1) + models


def needs_statistics(config: Config) -> bool:
    """Whether `prune` wants a capture of the dense model's Hessians instead of walking the model itself."""
    return not config.propagate_error


class OrderConfig(BaseModel):
    """The switches that the greedy order depends on; see Config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dampening_frac: float
    grouped_cholesky: bool
    group_size: int | None
    ridge: Literal["mean", "diagonal"] = Field(default="mean", exclude_if=lambda ridge: ridge == "mean")


def order_config(config: Config) -> OrderConfig | None:
    """What `order` is to be asked; None if each sparsity has an order of its own, errors being propagated."""
    if config.propagate_error:
        return None
    asked = config.model_dump(include=set(OrderConfig.model_fields))
    # what is chosen with the one is chosen with the other
    return OrderConfig.model_validate(asked | ({"ridge": "diagonal"} if config.ridge == "heldout" else {}))


def order(
    decoder: Decoder,
    config: OrderConfig,
    folder: Path,
    *,
    statistics: Path,
    options: WalkOptions,
    progress: Callable[[float, str], None] = lambda share, message: None,
    **_: Any,
) -> None:
    """Write the greedy order of every linear of the dense model into `folder`: one serves every sparsity."""
    from pruning.layerwise.orders import trace_orders
    from pruning.obs.groups import Solver
    from pruning.statistics.hessian import Statistics

    if not options.process_group.leads:
        return  # from Hessians alone, so there is nothing to share
    solver = Solver(config.dampening_frac, config.grouped_cholesky, config.group_size, "kv_group", ridge=config.ridge)
    count = decoder.num_layers
    trace_orders(
        decoder,
        Statistics(statistics),
        solver,
        folder,
        options,
        on_layer=lambda layer: progress((layer + 1) / count, f"layer {layer + 1} of {count}"),
    )


def prune(
    decoder: Decoder,
    calibration: CalibrationSet,
    config: Config,
    *,
    statistics: Path | None = None,
    orders: Path | None = None,
    options: WalkOptions,
    walk_state: WalkState,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> Pruned:
    """Prune; the compensated weights are in walk_state, the decoder stays as it was.

    statistics: folder of a capture if `needs_statistics(config)`, else None. orders: folder that `order` filled from
    the same statistics, to save the search. Raises PruningError when statistics and config disagree, the sparsity
    cannot be reached, a Hessian cannot be inverted, or auto or a search has no held-out windows to judge by.
    """
    from pruning.families import layer_cost, shapes
    from pruning.layerwise.split_search import Job, prune_best_split, prune_split
    from pruning.orders import Orders
    from pruning.statistics.hessian import Statistics

    _check_statistics(statistics, config)
    check_calibration(config, len(calibration.heldout_ids_ML))
    widths = shapes(decoder.skeleton)
    check_model(config, widths, layer_cost(decoder.skeleton), decoder.family)
    captured = Statistics(statistics) if statistics else None
    job = Job(decoder, calibration, captured, Orders(orders) if orders else None, options)
    if config.allocation == "searched":
        from pruning.search.searched import prune_by_search

        start = _knapsack(widths, config) if config.steps_first else _candidates(widths, config)
        return prune_by_search(job, start, _search(config), walk_state, progress)
    if config.allocation == "knapsack":
        from pruning.layerwise.knapsack import prune_by_knapsack

        return prune_by_knapsack(job, _knapsack(widths, config), walk_state, progress)
    candidates = _candidates(widths, config)
    if len(candidates) > 1:
        return prune_best_split(job, candidates, walk_state, progress)
    return prune_split(job, candidates[0], walk_state, progress)


def work(config: Config, size: DecoderSize, windows: Windows) -> dict[str, Work]:
    """What `prune` costs, by part; nothing where that is not counted. Raises PruningError."""
    from pruning.costs.walk import split_work

    if config.allocation != "curve" or not config.propagate_error:
        return {}
    return split_work(size, _candidates(size.shapes, config), windows)


def _check_statistics(statistics: Path | None, config: Config) -> None:
    if needs_statistics(config) and statistics is None:
        raise PruningError("propagate_error false needs statistics: the folder that capture_statistics wrote")
    if not needs_statistics(config) and statistics is not None:
        raise PruningError(
            "propagate_error true takes no statistics, it walks the model itself; leave them out or set it to false"
        )


def check_model(config: Config, layers: Sequence[LayerShape], cost: LayerCost, family: ModelFamily) -> None:
    """Raise PruningError if a model of these layers cannot be pruned so: by no split that is to be tried."""
    from pruning.allocation.budget import check_head_unit
    from pruning.allocation.schedule import check_grid, check_reach

    if config.head_unit is not None:
        check_head_unit(config.head_unit, layers)
    if config.allocation != "curve" and any(shape.num_experts for shape in layers):
        raise PruningError(
            f"allocation '{config.allocation}' knows no experts, which this model has; set allocation to curve"
        )
    if config.allocation == "searched":
        from pruning.search.forwards import check_forwards

        steps = config.steps if config.steps_first else None
        check_forwards(config.forwards, steps, 0 if config.steps_first else len(_candidates(layers, config)))
    if config.steps_first:
        from pruning.layerwise.knapsack import check_knapsack

        check_knapsack(_knapsack(layers, config).allocation, layers, cost)
        return
    candidates = _candidates(layers, config)
    if config.end_points is not None:  # each layer's ratio is given
        check_grid(candidates[0].allocation, layers, cost, threshold=False)
        return
    reasons: list[PruningError] = []
    for candidate in candidates:
        try:
            check_reach(candidate.allocation, layers, cost)
            check_grid(candidate.allocation, layers, cost, threshold=False)
        except PruningError as reason:
            reasons.append(reason)
    if len(reasons) == len(candidates):
        raise reasons[0]


def _candidates(layers: Sequence[LayerShape], config: Config) -> list[Candidate]:
    """The splits to try, by rising share of attention; one if there is nothing to choose."""
    grouped = _grouped(layers)
    split = config.split or ("auto" if grouped else "equal")
    if split != "auto":
        return [_candidate(config, split, config.head_unit or "kv_group")]
    unit = config.head_unit or ("query_head" if grouped else "kv_group")
    return [_candidate(config, name, unit) for name in _AUTO_SPLITS]


def _grouped(layers: Sequence[LayerShape]) -> bool:
    return all(shape.num_groups > 1 for shape in layers if shape.num_heads)  # some may have lost their attention


def _knapsack(layers: Sequence[LayerShape], config: Config) -> Knapsack:
    from pruning.layerwise.knapsack import Knapsack

    candidate = _candidate(config, "equal", config.head_unit or ("query_head" if _grouped(layers) else "kv_group"))
    return Knapsack(candidate.allocation, candidate.solver, config.steps, config.labels, config.step_samples)


def _search(config: Config) -> Search:
    from pruning.search.searched import Search

    return Search(config.search, config.forwards, config.levels, config.level_size, config.search_seed)


def _candidate(config: Config, split: str, head_unit: HeadUnit) -> Candidate:
    from pruning.allocation.budget import ATTENTION_RATIOS, Allocation
    from pruning.layerwise.split_search import Candidate
    from pruning.obs.groups import Solver

    allocation = Allocation(
        sparsity=config.sparsity,
        curve=config.curve,
        start_over_end=config.start_over_end,
        end_points=config.end_points,
        attention_ratio=ATTENTION_RATIOS[split],
        protect_first=config.protect_first,
        protect_last=config.protect_last,
        head_unit=head_unit,
        channel_multiple=config.channel_multiple,
        uniform=config.uniform,
    )
    solver = Solver(config.dampening_frac, config.grouped_cholesky, config.group_size, head_unit, ridge=config.ridge)
    return Candidate(split, allocation, solver)
