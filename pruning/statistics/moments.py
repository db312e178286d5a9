"""Mean, variance and mean square of each input of a linear, over all calibration tokens as if they came at once.

Shapes: T tokens, I input features of the linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.distributed import ProcessGroup
from pruning.errors import PruningError


@dataclass(frozen=True)
class Moments:
    """Of each input, float32 (I,). variance_I: unbiased, as `torch.var`. num_tokens: how many tokens they are of.

    Of weighted tokens: the weighted mean, and the mean over tokens of weight times squared deviation from it;
    mean_weight is then not 1. Tokens that another expert got are among them, with weight 0.
    """

    mean_I: Tensor
    variance_I: Tensor
    num_tokens: int
    mean_weight: float = 1.0

    @property
    def square_I(self) -> Tensor:
        """Mean of x² (times the weight), the diagonal of the Hessian."""
        biased_I = self.variance_I * ((self.num_tokens - 1) / self.num_tokens)
        return biased_I + self.mean_I.square() * self.mean_weight


class MomentsAccumulator:
    """Merges means and squared deviations batch by batch (Chan et al. 1979: exact, and stable where the mean is large).

    FLAP's own code takes the old mean for the new one (both names are one tensor), so that its variance depends on the
    order of the batches; this one does not.
    """

    def __init__(self, num_inputs: int, device: torch.device | str) -> None:
        self._mean_I = torch.zeros(num_inputs, dtype=torch.float32, device=device)
        self._deviation_I = torch.zeros_like(self._mean_I)  # sum of (x - mean)²
        self._num_tokens, self._weight = 0, 0.0  # the sum of the weights, of tokens without it is their number

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Take inputs of shape (..., I), any float dtype; every leading position is one token. weights: (...) float32,
        how much each token counts; None: once."""
        X_TI = inputs.reshape(inputs.shape[:-1].numel(), inputs.shape[-1]).float()
        if weights is None:
            mean_I, weight = X_TI.mean(0), float(len(X_TI))
            self._deviation_I += (X_TI - mean_I).square().sum(0)
        else:
            weights_T1 = weights.reshape(-1, 1)
            weight = float(weights_T1.sum())
            mean_I = (X_TI * weights_T1).sum(0) / weight if weight else torch.zeros_like(self._mean_I)
            self._deviation_I += ((X_TI - mean_I).square() * weights_T1).sum(0)
        total = self._weight + weight
        self._num_tokens += len(X_TI)
        if not total:  # an expert to which no token went
            return
        step_I = mean_I - self._mean_I
        self._deviation_I += step_I.square() * (self._weight * weight / total)
        self._mean_I += step_I * (weight / total)
        self._weight = total

    def skip(self, num_tokens: int) -> None:
        """So many tokens do not reach the linear (another expert's): they count with weight 0."""
        self._num_tokens += num_tokens

    def assume(self, num_tokens: int, square: float) -> None:
        """In the place of so many skipped tokens, as if they had come with inputs independent of each other, of mean
        square (times the weight) `square` each, the mean being as it is."""
        self._deviation_I += num_tokens * square

    @property
    def energy(self) -> float:
        """Sum of the squares of all inputs that came to this process, each times its token's weight."""
        squares_I = self._deviation_I.double() + self._mean_I.double().square() * self._weight
        return float(squares_I.sum())

    def finish(self, name: str, process_group: ProcessGroup | None = None) -> Moments:
        """The moments over the tokens of all processes of the group; the accumulator is used up.

        `name` (e.g. "layers.3.mlp.down_proj") goes into the errors. Raises PruningError when a value is not finite or
        there are fewer than two tokens, of which there is no variance.
        """
        process_group = process_group or ProcessGroup()
        num_tokens, weight = process_group.sum_of(self._num_tokens, self._weight)
        num_tokens = int(num_tokens)
        if num_tokens < 2:
            raise PruningError(f"the variance of {name} needs two tokens and there are {num_tokens}; raise num_samples")
        mean_I = self._mean_I * (self._weight / weight if weight else 0.0)
        process_group.sum_(mean_I)
        deviation_I = self._deviation_I + (self._mean_I - mean_I).square() * self._weight
        process_group.sum_(deviation_I)
        if not bool(torch.isfinite(deviation_I).all()):
            raise PruningError(
                f"the variance of {name} ({num_tokens} tokens) is not finite: the layer's inputs contain NaN or "
                "infinity; load the model in another dtype (float32 or bfloat16 instead of float16) or check its "
                "weights"
            )
        return Moments(mean_I, deviation_I / (num_tokens - 1), num_tokens, weight / num_tokens)
