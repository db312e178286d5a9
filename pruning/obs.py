"""Optimal Brain Surgeon on groups of input columns of a linear (SlimGPT, arXiv 2412.18110, sections 3.1 to 3.3).

For a weight W and H = mean x xᵀ (dampened), removing the columns G jointly and moving the kept ones costs

    err(G) = tr( W_G (H⁻¹_GG)⁻¹ W_Gᵀ )      with      dW = - W_G (H⁻¹_GG)⁻¹ H⁻¹_G,:

and leaves the inverse H⁻¹ - H⁻¹_:,G (H⁻¹_GG)⁻¹ H⁻¹_G,: for the columns that remain: a rank-|G| down-date, no
re-inversion. With H the mean over tokens the error is in units of mean squared output error per token.

Shapes: O outputs, I inputs, G columns of one elimination, K kept columns, N groups, D columns per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.hessian import Hessian

#: rcond below which float64 solutions lose the digits that float32 weights keep
_MIN_RCOND = 1e-13


@dataclass(frozen=True)
class Problem:
    """One linear ready for elimination: everything in float64 on one device.

    W_OI: weight with dead inputs zeroed. H_II: dampened Hessian. inverse_II: its inverse. rcond: reciprocal condition
    estimate (1-norm) of H_II. name: for error messages.
    """

    name: str
    W_OI: Tensor
    H_II: Tensor
    inverse_II: Tensor
    rcond: float


@dataclass(frozen=True)
class Elimination:
    """The greedy order of removed groups and the error after each round.

    order: group indices in the order they went. rounds: number of groups gone after each round.
    errors: cumulative predicted error after each round, same length as `rounds`.
    """

    order: tuple[int, ...]
    rounds: tuple[int, ...]
    errors: tuple[float, ...]


def prepare(name: str, W_OI: Tensor, hessian: Hessian, *, dampening_frac: float) -> Problem:
    """Dampen and invert the Hessian of one linear.

    Dead inputs (H_ii = 0) get H_ii = 1 and a zero weight column, so that they go first and cost nothing.
    Raises PruningError when H is not positive definite or too ill conditioned to trust, with the way out.
    """
    H_II = hessian.matrix_II.to(torch.float64, copy=True)
    W_OI = W_OI.to(H_II.device, torch.float64, copy=True)
    diagonal_I = H_II.diagonal()
    dead_I = diagonal_I == 0
    W_OI[:, dead_I] = 0
    mean_diagonal = diagonal_I.mean()
    diagonal_I += dampening_frac * mean_diagonal
    diagonal_I[dead_I] = 1.0
    way_out = f"raise dampening_frac (now {dampening_frac:g}) or num_samples"
    L_II, info = torch.linalg.cholesky_ex(H_II)
    if int(info) != 0:
        raise PruningError(f"Hessian of {name} ({hessian.num_tokens} tokens) is not positive definite; {way_out}")
    inverse_II = torch.cholesky_inverse(L_II)
    rcond = 1.0 / (_one_norm(H_II) * _one_norm(inverse_II))
    if not rcond > _MIN_RCOND:
        raise PruningError(
            f"Hessian of {name} ({hessian.num_tokens} tokens) is too ill conditioned (1/condition {rcond:.1e}); "
            f"{way_out}"
        )
    return Problem(name, W_OI, H_II, inverse_II, rcond)


def group_scores(W_OI: Tensor, inverse_II: Tensor, columns_ND: Tensor, *, conditional: bool = True) -> Tensor:
    """Error of removing each group of columns alone, shape (N,).

    conditional=True is the grouped Cholesky decomposition (GCD, section 3.2): with H⁻¹_GG = L Lᵀ the error is
    ‖L⁻¹ W_Gᵀ‖²_F, equal to taking the group's columns one after another. conditional=False is the "-GCD" ablation:
    W² / diag(H⁻¹) summed over the group as if its columns were independent.
    """
    W_NDO = W_OI.T[columns_ND]
    if not conditional or columns_ND.shape[1] == 1:
        diagonal_ND = inverse_II.diagonal()[columns_ND]
        return (W_NDO.square().sum(2) / diagonal_ND).sum(1)
    blocks_NDD = inverse_II[columns_ND.unsqueeze(2), columns_ND.unsqueeze(1)]
    L_NDD = torch.linalg.cholesky(blocks_NDD)
    half_NDO: Tensor = torch.linalg.solve_triangular(L_NDD, W_NDO, upper=False)
    return half_NDO.square().sum((1, 2))


def eliminate_(W_OI: Tensor, inverse_II: Tensor, columns_G: Tensor) -> float:
    """Remove columns jointly: compensate W_OI and down-date inverse_II in place; returns the error it cost."""
    L_GG = torch.linalg.cholesky(inverse_II[columns_G][:, columns_G])
    half_GI = torch.linalg.solve_triangular(L_GG, inverse_II[columns_G], upper=False)
    half_GO = torch.linalg.solve_triangular(L_GG, W_OI[:, columns_G].T, upper=False)
    W_OI.addmm_(half_GO.T, half_GI, alpha=-1)
    inverse_II.addmm_(half_GI.T, half_GI, alpha=-1)
    # exact zeros where only rounding is left, so that no later score can see a removed column
    W_OI[:, columns_G] = 0
    inverse_II[columns_G] = 0
    inverse_II[:, columns_G] = 0
    return float(half_GO.square().sum())


def eliminate_groups(
    problem: Problem,
    columns_ND: Tensor,
    group_sizes: Iterator[int],
    *,
    conditional: bool = True,
    eligible: Callable[[Tensor], Tensor] | None = None,
) -> Elimination:
    """Batched greedy pruning (section 3.2): each round removes the groups with the smallest errors.

    columns_ND: the columns of every group. group_sizes: how many groups go in each round; its sum is how many go.
    eligible: from the mask of live groups (N,) to the mask of those that may go now (default: all live ones).
    Does not change the problem. Raises PruningError when a down-date loses positive definiteness.
    """
    W_OI, inverse_II = problem.W_OI.clone(), problem.inverse_II.clone()
    live_N = torch.ones(len(columns_ND), dtype=torch.bool, device=W_OI.device)
    order: list[int] = []
    rounds: list[int] = []
    errors: list[float] = []
    try:
        for size in group_sizes:
            may_go_N = (eligible(live_N) if eligible else live_N).nonzero().squeeze(1)
            assert size <= len(may_go_N), (problem.name, size, len(may_go_N))
            scores = group_scores(W_OI, inverse_II, columns_ND[may_go_N], conditional=conditional)
            chosen = may_go_N[scores.topk(size, largest=False, sorted=True).indices]
            error = eliminate_(W_OI, inverse_II, columns_ND[chosen].flatten())
            live_N[chosen] = False
            order += chosen.tolist()
            rounds.append(len(order))
            errors.append((errors[-1] if errors else 0.0) + error)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not in __all__
        raise PruningError(
            f"the inverse Hessian of {problem.name} lost positive definiteness after {len(order)} removals "
            f"(1/condition {problem.rcond:.1e}); raise dampening_frac or num_samples"
        ) from error
    return Elimination(tuple(order), tuple(rounds), tuple(errors))


def refit(problem: Problem, kept_K: Tensor) -> Tensor:
    """Least-squares weight on the kept columns, (O, K): W H_:,K (H_KK)⁻¹.

    What the eliminations converge to, solved afresh from H so that no rounding of the down-dates reaches the weights.
    """
    H_IK = problem.H_II[:, kept_K]
    L_KK = torch.linalg.cholesky(H_IK[kept_K])
    return torch.cholesky_solve((problem.W_OI @ H_IK).T, L_KK).T


def output_error(W_OI: Tensor, pruned_OI: Tensor, H_II: Tensor) -> float:
    """Mean squared output error per token, tr((W - W') H (W - W')ᵀ), of using W' for W."""
    difference_OI = (W_OI - pruned_OI).to(H_II.dtype)
    return float(((difference_OI @ H_II) * difference_OI).sum())


def halving_group_sizes(count: int, *, largest: int = 1024, smallest: int = 8) -> Iterator[int]:
    """Dynamic group size (DGS, section 3.2): half of what is still to go, between `smallest` and `largest`."""
    while count > 0:
        size = min(count, max(smallest, min(largest, count // 2)))
        yield size
        count -= size


def fixed_group_sizes(count: int, size: int) -> Iterator[int]:
    """Groups of `size` (the last one smaller) until `count` have gone: one head a round, or the "-DGS" ablation."""
    while count > 0:
        yield min(count, size)
        count -= size


def _one_norm(matrix_II: Tensor) -> float:
    # a linear without inputs (a plan may keep no channel of a layer) is perfectly conditioned
    return float(matrix_II.abs().sum(0).max()) if matrix_II.numel() else 1.0
