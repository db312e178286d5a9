"""Second moments between the inputs of a linear and what its output should be: what a least-squares fit needs.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.distributed import ProcessGroup


@dataclass(frozen=True)
class CrossMoments:
    """Means over tokens. inputs_II: of x xᵀ. cross_OI: of y xᵀ. energy: of |y|². All float32, energy a number."""

    inputs_II: Tensor
    cross_OI: Tensor
    energy: float
    num_tokens: int

    def error(self, weight_OI: Tensor) -> float:
        """Mean of |y - W x|² per token, from the moments alone, in float64."""
        W_OI, H_II, C_OI = (each.double() for each in (weight_OI, self.inputs_II, self.cross_OI))
        return self.energy - 2 * float((C_OI * W_OI).sum()) + float(((W_OI @ H_II) * W_OI).sum())

    def fit(self, prior_OI: Tensor, ridge: float) -> Tensor:
        """The weight, (O, I) float64, that minimises `error` + ridge x mean diagonal x |W - prior|²."""
        H_II, prior_OI = self.inputs_II.double(), prior_OI.double()
        residual_OI = self.cross_OI.double() - prior_OI @ H_II
        damped_II = H_II + ridge * H_II.diagonal().mean() * torch.eye(len(H_II), dtype=H_II.dtype, device=H_II.device)
        return prior_OI + torch.cholesky_solve(residual_OI.T, torch.linalg.cholesky(damped_II)).T


class CrossMomentsAccumulator:
    """Adds up batch by batch, in float32, on the device of the activations."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self._inputs_II = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)
        self._cross_OI = torch.zeros(num_outputs, num_inputs, dtype=torch.float32, device=device)
        self._energy, self._num_tokens = 0.0, 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take inputs (..., I) and wanted outputs (..., O), any float dtype; every leading position is one token."""
        X_TI, Y_TO = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
        self._inputs_II.addmm_(X_TI.T, X_TI)
        self._cross_OI.addmm_(Y_TO.T, X_TI)
        self._energy += float(Y_TO.square().sum())
        self._num_tokens += len(X_TI)

    def finish(self, process_group: ProcessGroup) -> CrossMoments | None:
        """The means over the tokens of all processes; None if there were none. The accumulator is used up."""
        energy, num_tokens = process_group.sum_of(self._energy, self._num_tokens)
        process_group.sum_(self._inputs_II)
        process_group.sum_(self._cross_OI)
        if not num_tokens:
            return None
        self._inputs_II /= num_tokens
        self._cross_OI /= num_tokens
        return CrossMoments(self._inputs_II, self._cross_OI, energy / num_tokens, int(num_tokens))
