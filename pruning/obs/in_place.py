"""Large matrices factored, made smaller and measured where they are, without a second one.

Shapes: I inputs, R rows, C columns, S of both that stay, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: rows of a matrix that are worked on at once
_ROWS = 1024


def factor_(matrix_II: Tensor) -> bool:
    """Put the Cholesky factor L of a symmetric matrix into its place, as Lᵀ: LAPACK counts by columns, and only a
    matrix that does is not copied. False if the matrix is not positive definite; it is spoilt then."""
    info = torch.empty((), dtype=torch.int32, device=matrix_II.device)
    torch.linalg.cholesky_ex(matrix_II.mT, out=(matrix_II.mT, info))
    return int(info) == 0


def to_front_(matrix_RC: Tensor, rows_S: Tensor, columns_S: Tensor | None = None) -> Tensor:
    """The square matrix of those rows (ascending) and columns (None: all) of a contiguous one, in the memory of it."""
    size = len(rows_S)
    moved_SS = matrix_RC.view(-1)[: size * size].view(size, size)
    for start in range(0, size, _ROWS):
        # a row is read before its place is written: it only moves towards the front
        rows = matrix_RC[rows_S[start : start + _ROWS]]
        moved_SS[start : start + _ROWS] = rows if columns_S is None else rows[:, columns_S]
    return moved_SS


def squares(W_OI: Tensor) -> Tensor:
    """The sum of squares of each column, without a second matrix."""
    squares_I = W_OI.new_zeros(W_OI.shape[1])
    for start in range(0, len(W_OI), _ROWS):
        squares_I += W_OI[start : start + _ROWS].square().sum(0)
    return squares_I


def one_norm(matrix_II: Tensor, size_I: Tensor | None = None) -> float:
    """Of a symmetric matrix, or of the one whose rows and columns are divided by `size_I`."""
    norms = []
    for start in range(0, len(matrix_II), _ROWS):
        rows_RI = matrix_II[start : start + _ROWS].abs()
        sums_R = rows_RI.sum(1) if size_I is None else rows_RI @ (1 / size_I) / size_I[start : start + _ROWS]
        norms.append(float(sums_R.max()))
    return max(norms, default=1.0)  # a linear without inputs (a plan may keep no channel) is perfectly conditioned
