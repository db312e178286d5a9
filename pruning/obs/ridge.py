"""What the diagonal of a Hessian is raised by, before weights are refitted from it.

The paper adds a share of the mean diagonal (SlimGPT, arXiv 2412.18110, as SparseGPT does). Inputs of a linear differ in
size by orders of magnitude, so that what is nothing to the large ones drowns the small ones; a share of each input's
own second moment is ridge regression on standardised inputs. How large it should be differs from linear to linear: the
held-out windows can say.

Shapes: O outputs, I inputs, K kept columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pruning.obs.elimination import System, refit
from pruning.statistics.hessian import Hessian

Ridge = Literal["mean", "diagonal", "heldout"]

#: of each diagonal element; tried from below until the held-out error rises
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def refit_by_heldout(system: System, hessian: Hessian, heldout: Hessian, kept_K: Tensor) -> tuple[Tensor, float]:
    """The refitted weight (O, K) that errs least on the held-out tokens, and its share of the diagonal.

    The error has one valley over the share: too little fits noise of the calibration tokens, too much leaves the kept
    weights as they were.
    """
    captured_I = hessian.matrix_II.diagonal().to(system.W_OI)
    error_of = _HeldoutError(system, heldout, kept_K)
    best_OK, best_error, best_share = None, torch.inf, SHARES[0]
    for share in SHARES:
        diagonal_I = ((1 + share) * captured_I).masked_fill(captured_I == 0, 1.0)
        weight_OK = refit(replace(system, diagonal_I=diagonal_I), kept_K)
        error = error_of(weight_OK)
        if best_OK is not None and not error < best_error:
            break
        best_OK, best_error, best_share = weight_OK, error, share
    assert best_OK is not None
    return best_OK, best_share


class _HeldoutError:
    """tr((W - W') H (W - W')ᵀ) of the held-out H less what does not depend on W', each output counted as it counts."""

    def __init__(self, system: System, heldout: Hessian, kept_K: Tensor) -> None:
        H_II = heldout.matrix_II.to(system.W_OI.device)
        self._system = system
        W_OI = system.counted(system.W_OI).to(H_II)
        self._wanted_OK = W_OI @ H_II[:, kept_K]
        self._H_KK = H_II[kept_K][:, kept_K]

    def __call__(self, weight_OK: Tensor) -> float:
        W_OK = self._system.counted(weight_OK).to(self._H_KK)
        return float((W_OK * (W_OK @ self._H_KK - 2 * self._wanted_OK)).sum(dtype=torch.float64))
