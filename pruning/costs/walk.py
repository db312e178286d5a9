"""What pruning layer by layer costs: one walk, and the choice of a split before it."""

from __future__ import annotations

from collections.abc import Sequence

from pruning.allocation.budget import LayerBudget
from pruning.allocation.schedule import solve_budgets
from pruning.costs.work import (
    DecoderSize,
    Windows,
    Work,
    as_float32,
    forward_work,
    judging_work,
    moments_work,
    solver_work,
)
from pruning.errors import PruningError
from pruning.layerwise.split_search import Candidate, scouting_counts
from pruning.obs.elimination import single_precision_will_do
from pruning.obs.groups import channel_groups

#: splits that are usually tried before one does not help any more; the one before it then wins
_TRIED = 3


def split_work(size: DecoderSize, candidates: Sequence[Candidate], windows: Windows) -> dict[str, Work]:
    """Of pruning by the best of the candidates, by part: "forward", "moments", "solve", "files", and "split" for the
    trials. Raises PruningError if none can reach its sparsity."""
    reached: list[tuple[Candidate, tuple[LayerBudget, ...]]] = []
    errors: list[PruningError] = []
    for candidate in candidates:
        try:
            reached.append((candidate, solve_budgets(size.shapes, size.cost, candidate.allocation)))
        except PruningError as error:
            errors.append(error)
    if not reached:
        raise errors[0]
    tried = reached[:_TRIED] if len(reached) > 1 else []
    winner, budgets = reached[max(0, len(tried) - 2)]
    parts = walk_work(size, winner, budgets, windows)
    if tried:
        parts["split"] = _trials(size, tried, windows)
    return parts


def walk_work(
    size: DecoderSize, candidate: Candidate, budgets: Sequence[LayerBudget], windows: Windows, *, measured: bool = True
) -> dict[str, Work]:
    """Of one walk that prunes every layer as the budgets say, by part.

    measured: False is for a trial: held-out windows have no moments, errors are not reported, and nothing is written.
    """
    moments, solve = Work(), Work()
    for shape, budget in zip(size.shapes, budgets, strict=True):
        attention, channels = size.inputs(shape)
        if candidate.allocation.head_unit == "query_head":
            units: Sequence[int] = [size.head_dim] * (budget.head_units * shape.num_kv_heads)
        else:
            units = [size.head_dim * shape.num_groups] * budget.head_units
        rounds = channel_groups(shape, budget.channels, candidate.solver).sizes
        for num_inputs, gone in ((attention, units), (channels, rounds)):
            if sum(gone):
                moments += moments_work(num_inputs, windows.total if measured else windows.tokens)
                solve += solver_work(num_inputs, size.hidden_size, gone)
                if measured:
                    solve += Work(float32_flops=6.0 * size.hidden_size * num_inputs**2)
    files = Work(disk_bytes=float(size.layer_bytes))
    if measured:
        stream = windows.total * size.hidden_size * size.item_bytes * len(size.shapes)
        files += Work(disk_bytes=float(size.layer_bytes + stream))
    return {"forward": forward_work(size, windows), "moments": moments, "solve": solve, "files": files}


def _trials(size: DecoderSize, tried: Sequence[tuple[Candidate, tuple[LayerBudget, ...]]], windows: Windows) -> Work:
    widest = max(max(size.inputs(shape)) for shape in size.shapes)
    tokens, heldout = (count * windows.seq_len for count in scouting_counts(widest, windows.seq_len))
    scouting = Windows(min(windows.tokens, tokens), min(windows.heldout, heldout), windows.seq_len)
    total = forward_work(size, Windows(0, scouting.heldout, windows.seq_len))  # the dense model's stream
    for candidate, budgets in tried:
        parts = walk_work(size, candidate, budgets, scouting, measured=False)
        if single_precision_will_do(widest, candidate.solver.dampening_frac):
            parts["solve"] = as_float32(parts["solve"])
        total = sum(parts.values(), total + judging_work(size, scouting))
    return total
