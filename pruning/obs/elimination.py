"""Optimal Brain Surgeon on groups of input columns of a linear (SlimGPT, arXiv 2412.18110, sections 3.1 to 3.3).

For a weight W and H = mean x xᵀ (dampened), removing the columns G jointly and moving the kept ones costs

    err(G) = tr( W_G (H⁻¹_GG)⁻¹ W_Gᵀ )      with      dW = - W_G (H⁻¹_GG)⁻¹ H⁻¹_G,:

and leaves the inverse H⁻¹ - H⁻¹_:,G (H⁻¹_GG)⁻¹ H⁻¹_G,: for the columns that remain: a rank-|G| down-date, no
re-inversion. With H the mean over tokens the error is in units of mean squared output error per token.

Down-dates only choose what goes: the final weights are refitted from H, and `removal_error` of the refit says whether
rounding has spoilt the predicted errors. Removed columns are dropped from the matrices from time to time, so that later
rounds are cheaper.

Memory decides what fits beside a 70B's layer (28,672 inputs: a float64 matrix of them is 6.1 GiB), so matrices are
factored, inverted and made smaller where they are, and H stays as it was captured: in all at most 2.5 of these
matrices, the captured one and the weights included.

Shapes: O outputs, I inputs, A columns still in the matrices, G columns of one elimination, K kept columns, N groups,
D columns per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.obs.in_place import factor_, one_norm, squares, to_front_
from pruning.statistics.hessian import Hessian

#: rcond below which float64 solutions lose the digits that float32 weights keep
_MIN_RCOND = 1e-13
#: share of the columns that must have gone before the matrices are copied without them
COMPACT_SHARE = 0.125


@dataclass(frozen=True)
class System:
    """One linear and the dampened Hessian of its inputs, to be solved in one dtype (float64, but for trials) on one
    device.

    W_OI: weight with dead inputs zeroed. captured_II: the Hessian as it was captured, in float32; diagonal_I: what its
    diagonal is when dampened. name: for error messages. scale_O: how much an error of each output counts, None for all
    the same: scores and errors depend on it, a least-squares refit does not. num_tokens, dampening_frac, own_share:
    what the Hessian was made of, see `dampen`.
    """

    name: str
    W_OI: Tensor
    captured_II: Tensor
    diagonal_I: Tensor
    scale_O: Tensor | None = field(default=None, kw_only=True)
    num_tokens: int = field(default=0, kw_only=True)
    dampening_frac: float = field(default=0.0, kw_only=True)
    own_share: bool = field(default=False, kw_only=True)

    def counted(self, weight_OI: Tensor) -> Tensor:
        """Rows of outputs times how much they count."""
        return weight_OI if self.scale_O is None else weight_OI * self.scale_O[:, None]

    def dampened(self) -> Tensor:
        """H_II, a new matrix."""
        H_II = self.captured_II.to(self.W_OI.dtype, copy=True)
        H_II.diagonal().copy_(self.diagonal_I)
        return H_II

    def columns(self, columns_K: Tensor) -> Tensor:
        """H_IK, a new matrix."""
        H_IK = self.captured_II[:, columns_K].to(self.W_OI.dtype)
        H_IK[columns_K, torch.arange(len(columns_K), device=H_IK.device)] = self.diagonal_I[columns_K]
        return H_IK


@dataclass(frozen=True)
class Problem(System):
    """A system ready for elimination. inverse_II: of the dampened Hessian. rcond: reciprocal condition estimate
    (1-norm) of that; with own shares of it scaled to a diagonal of ones, since neither it nor what is solved depends on
    the inputs' units.
    """

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


def dampen(
    name: str,
    W_OI: Tensor,
    hessian: Hessian,
    *,
    dampening_frac: float,
    own_share: bool = False,
    dtype: torch.dtype = torch.float64,
    scale_O: Tensor | None = None,
) -> System:
    """Add `dampening_frac` of the mean diagonal to the Hessian's diagonal; own_share: of each element instead.

    Dead inputs (H_ii = 0) get H_ii = 1 and a zero weight column, so that they go first and cost nothing. dtype: float32
    halves time and memory and will do for a trial where `single_precision_will_do`.
    """
    captured_II = hessian.matrix_II
    W_OI = W_OI.to(captured_II.device, dtype, copy=True)
    diagonal_I = captured_II.diagonal().to(dtype, copy=True)
    dead_I = diagonal_I == 0
    W_OI[:, dead_I] = 0
    diagonal_I += dampening_frac * (diagonal_I if own_share else diagonal_I.mean())
    diagonal_I[dead_I] = 1.0
    return System(
        name,
        W_OI,
        captured_II,
        diagonal_I,
        scale_O=None if scale_O is None else scale_O.to(W_OI),
        num_tokens=hessian.num_tokens,
        dampening_frac=dampening_frac,
        own_share=own_share,
    )


def prepare(system: System) -> Problem:
    """Invert the dampened Hessian.

    Raises PruningError when it is not positive definite or too ill conditioned to trust, with the way out.
    """
    hessian = f"Hessian of {system.name} ({system.num_tokens} tokens)"
    way_out = f"raise dampening_frac (now {system.dampening_frac:g}) or num_samples"
    matrix_II = system.dampened()
    size_I = system.diagonal_I.sqrt() if system.own_share else None
    norm = one_norm(matrix_II, size_I)
    if not factor_(matrix_II):
        raise PruningError(f"{hessian} is not positive definite; {way_out}")
    torch.cholesky_inverse(matrix_II.mT, out=matrix_II.mT)
    rcond = 1.0 / (norm * one_norm(matrix_II, None if size_I is None else 1 / size_I))
    if not rcond > _MIN_RCOND:
        raise PruningError(f"{hessian} is too ill conditioned (1/condition {rcond:.1e}); {way_out}")
    return Problem(
        **{each.name: getattr(system, each.name) for each in fields(system)}, inverse_II=matrix_II, rcond=rcond
    )


def single_precision_will_do(num_inputs: int, dampening_frac: float) -> bool:
    """Whether float32 keeps two digits of the inverse: the condition is at most num_inputs / dampening_frac + 1."""
    return num_inputs / dampening_frac * torch.finfo(torch.float32).eps < 0.02


def group_scores(W_OI: Tensor, inverse_II: Tensor, columns_ND: Tensor, *, conditional: bool = True) -> Tensor:
    """Error of removing each group of columns alone, shape (N,).

    conditional=True is the grouped Cholesky decomposition (GCD, section 3.2): with H⁻¹_GG = L Lᵀ the error is
    ‖L⁻¹ W_Gᵀ‖²_F, equal to taking the group's columns one after another. conditional=False is the "-GCD" ablation:
    W² / diag(H⁻¹) summed over the group as if its columns were independent.
    """
    if not conditional or columns_ND.shape[1] == 1:
        return (squares(W_OI) / inverse_II.diagonal())[columns_ND].sum(1)
    W_NDO = W_OI.T[columns_ND]
    blocks_NDD = inverse_II[columns_ND.unsqueeze(2), columns_ND.unsqueeze(1)]
    L_NDD = torch.linalg.cholesky(blocks_NDD)
    half_NDO: Tensor = torch.linalg.solve_triangular(L_NDD, W_NDO, upper=False)
    return half_NDO.square().sum((1, 2))


def eliminate_(W_OI: Tensor, inverse_II: Tensor, columns_G: Tensor) -> float:
    """Remove columns jointly: compensate W_OI and down-date inverse_II in place; returns the error it cost."""
    inverse_GI = inverse_II[columns_G]
    error = _down_date_(W_OI, inverse_II, W_OI[:, columns_G], inverse_GI[:, columns_G], inverse_GI)
    # exact zeros where only rounding is left, so that no later score can see a removed column
    W_OI[:, columns_G] = 0
    inverse_II[columns_G] = 0
    inverse_II[:, columns_G] = 0
    return error


def _down_date_(W_OA: Tensor, inverse_AA: Tensor, W_OG: Tensor, inverse_GG: Tensor, inverse_GA: Tensor) -> float:
    """Take the columns G out of weight and inverse of the columns A, in place; returns the error it costs."""
    L_GG = torch.linalg.cholesky(inverse_GG)
    half_GA = torch.linalg.solve_triangular(L_GG, inverse_GA, upper=False)
    half_GO = torch.linalg.solve_triangular(L_GG, W_OG.T, upper=False)
    W_OA.addmm_(half_GO.T, half_GA, alpha=-1)
    inverse_AA.addmm_(half_GA.T, half_GA, alpha=-1)
    return float(half_GO.square().sum())


def eliminate_groups(
    problem: Problem,
    columns_ND: Tensor,
    group_sizes: Iterator[int],
    *,
    conditional: bool = True,
    eligible: Callable[[Tensor], Tensor] | None = None,
    uses_up: bool = False,
) -> Elimination:
    """Batched greedy pruning (section 3.2): each round removes the groups with the smallest errors.

    columns_ND: the columns of every group. group_sizes: how many groups go in each round; its sum is how many go.
    eligible: from the mask of live groups (N,) to the mask of those that may go now (default: all live ones). uses_up:
    the problem's inverse is worked on as it is, and is nothing afterwards; else the problem does not change. Raises
    PruningError when a down-date loses positive definiteness.
    """
    matrices = _Matrices(problem, columns_ND, uses_up)
    live_N = torch.ones(len(columns_ND), dtype=torch.bool, device=columns_ND.device)
    order: list[int] = []
    rounds: list[int] = []
    errors: list[float] = []
    try:
        for size in group_sizes:
            may_go_N = (eligible(live_N) if eligible else live_N).nonzero().squeeze(1)
            assert size <= len(may_go_N), (problem.name, size, len(may_go_N))
            chosen = matrices.cheapest(may_go_N, size, conditional=conditional)
            error = matrices.eliminate_(chosen)
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


class _Matrices:
    """Weight and inverse of the columns that are left, and of some that have gone (zero in both)."""

    def __init__(self, problem: Problem, columns_ND: Tensor, uses_up: bool) -> None:
        self._columns_ND = columns_ND
        self._W_OA = problem.W_OI.clone() if problem.scale_O is None else problem.counted(problem.W_OI)
        self._inverse_AA = problem.inverse_II if uses_up else problem.inverse_II.clone()
        self._active_A = torch.arange(problem.W_OI.shape[1], device=columns_ND.device)
        self._place_I = self._active_A.clone()  # where a column of the linear stands in the matrices
        self._gone_I = torch.zeros_like(self._active_A, dtype=torch.bool)

    def cheapest(self, groups_M: Tensor, size: int, *, conditional: bool) -> Tensor:
        """Those `size` of the groups whose removal costs least, cheapest first."""
        places_MD = self._place_I[self._columns_ND[groups_M]]
        scores_M = group_scores(self._W_OA, self._inverse_AA, places_MD, conditional=conditional)
        return groups_M[scores_M.topk(size, largest=False, sorted=True).indices]

    def eliminate_(self, groups_M: Tensor) -> float:
        """Remove groups of columns jointly; returns the error it cost."""
        columns_G = self._columns_ND[groups_M].flatten()
        places_G = self._place_I[columns_G]
        self._gone_I[columns_G] = True
        stay_A = (~self._gone_I[self._active_A]).nonzero().squeeze(1)
        if len(self._active_A) - len(stay_A) <= COMPACT_SHARE * len(self._active_A):
            return eliminate_(self._W_OA, self._inverse_AA, places_G)
        W_OG, inverse_GA = self._W_OA[:, places_G], self._inverse_AA[places_G]
        self._active_A = self._active_A[stay_A]
        # made smaller first, so that nothing is computed for columns that go
        self._W_OA, self._inverse_AA = self._W_OA[:, stay_A], to_front_(self._inverse_AA, stay_A, stay_A)
        self._place_I[self._active_A] = torch.arange(len(stay_A), device=stay_A.device)
        return _down_date_(self._W_OA, self._inverse_AA, W_OG, inverse_GA[:, places_G], inverse_GA[:, stay_A])


def refit(system: System, kept_K: Tensor) -> Tensor:
    """Least-squares weight on the kept columns (ascending), (O, K): W H_:,K (H_KK)⁻¹.

    What the down-dates give but for their rounding, which so does not reach the weights.
    """
    H_IK = system.columns(kept_K)
    W_OK = system.W_OI @ H_IK
    H_KK = to_front_(H_IK, kept_K)
    if not factor_(H_KK):
        way_out = f"raise dampening_frac (now {system.dampening_frac:g}) or num_samples"
        raise PruningError(f"Hessian of {system.name} ({system.num_tokens} tokens) is not positive definite; {way_out}")
    L_KK = H_KK.mT
    torch.linalg.solve_triangular(L_KK, W_OK.mT, upper=False, out=W_OK.mT)
    torch.linalg.solve_triangular(L_KK.mT, W_OK.mT, upper=True, out=W_OK.mT)
    return W_OK


def removal_error(system: System, pruned_OI: Tensor, removed_G: Tensor) -> float:
    """Mean squared output error per token, dampened as the predicted one, of a refitted weight without the columns G.

    tr((W - W') H (W - W')ᵀ), of which the refit makes everything but (W - W') H_:,G W_Gᵀ vanish.
    """
    difference_OG = system.counted(system.W_OI - pruned_OI) @ system.columns(removed_G)
    return float((difference_OG * system.counted(system.W_OI[:, removed_G])).sum())


def output_error(W_OI: Tensor, pruned_OI: Tensor, H_II: Tensor) -> float:
    """Mean squared output error per token, tr((W - W') H (W - W')ᵀ), of using W' for W."""
    difference_OI = (W_OI - pruned_OI).to(H_II.dtype)
    return float(((difference_OI @ H_II) * difference_OI).sum())
