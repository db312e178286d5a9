"""Second moments of the inputs of a linear: the one statistic that Optimal Brain Surgeon needs.

Shapes: T tokens, I input features of the linear, B rows of one block of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pruning.distributed import ProcessGroup
from pruning.errors import PruningError

#: rows of a block; larger ones keep a GPU busy
BLOCK, _DEVICE_BLOCK = 256, 2048
#: inputs in these are multiplied as they are, their products summed in float32, where the device does that
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Hessian:
    """Mean of x xᵀ over calibration tokens, each times its weight if they have weights; OBS's H is twice this (the
    factor moves no decision).

    matrix_II: (I, I) float32, symmetric. num_tokens: how many tokens came; the mean of an expert's is over those that
    did not, too. assumed_tokens: how many of these it is as if they had come, see `HessianAccumulator.assume`.
    """

    matrix_II: Tensor
    num_tokens: int
    assumed_tokens: int = 0


class HessianAccumulator:
    """Sums x xᵀ batch by batch in float32, on the device of the activations; CUDA multiplies inputs in half precision
    without making them float32 first, which is exact and several times as fast.

    Only the blocks on and below the diagonal are computed (half the work of the full product);
    `finish` mirrors them. Raises PruningError from `finish` when a sum is not finite.
    """

    def __init__(self, num_inputs: int, device: torch.device | str) -> None:
        self._sum_II = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)
        self._num_tokens = self._num_skipped = self._num_assumed = 0

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Take inputs of shape (..., I), any float dtype; every leading position is one token. weights: (...) float32,
        how much each token counts; None: once."""
        X_TI = inputs.reshape(inputs.shape[:-1].numel(), inputs.shape[-1])
        halves = weights is None and X_TI.dtype in _HALF and _multiplies_halves(X_TI.device)
        if not halves:
            X_TI = X_TI.float()
        if weights is not None:
            X_TI = X_TI * weights.reshape(-1, 1).sqrt()
        num_inputs, block = X_TI.shape[1], BLOCK if X_TI.device.type == "cpu" else _DEVICE_BLOCK
        for start in range(0, num_inputs, block):
            stop = min(start + block, num_inputs)
            into, left, right = self._sum_II[start:stop, :stop], X_TI[:, start:stop].T, X_TI[:, :stop]
            if halves:
                into += torch.mm(left, right, out_dtype=torch.float32)
            else:
                into.addmm_(left, right)
        self._num_tokens += X_TI.shape[0]

    def skip(self, num_tokens: int) -> None:
        """So many tokens do not reach the linear (another expert's): they count with weight 0."""
        self._num_skipped += num_tokens

    def assume(self, num_tokens: int, square: float) -> None:
        """In the place of so many skipped tokens, as if they had come with inputs independent of each other, of mean
        square (times the weight) `square` each."""
        self._sum_II.diagonal().add_(num_tokens * square)
        self._num_assumed += num_tokens

    @property
    def energy(self) -> float:
        """Sum of the squares of all inputs that came to this process, each times its token's weight."""
        return float(self._sum_II.diagonal().sum(dtype=torch.float64))

    def finish(self, name: str, process_group: ProcessGroup | None = None) -> Hessian:
        """The mean over the tokens of all processes of the group; the accumulator is used up.

        `name` (e.g. "layers.3.mlp.down_proj") goes into the errors.
        """
        process_group = process_group or ProcessGroup()
        counts = (self._num_tokens, self._num_skipped, self._num_assumed)
        num_tokens, num_skipped, num_assumed = map(int, process_group.sum_of(*counts))
        if num_tokens + num_skipped == 0:
            raise PruningError(f"Hessian of {name} has seen no tokens; raise num_samples")
        mean_II = self._sum_II
        process_group.sum_(mean_II)
        for start in range(0, len(mean_II), BLOCK):  # mirrored block by block: no second matrix
            stop = min(start + BLOCK, len(mean_II))
            mean_II[:start, start:stop] = mean_II[start:stop, :start].T
            block = mean_II[start:stop, start:stop]
            block.tril_()
            block += block.tril(-1).T
        mean_II /= num_tokens + num_skipped
        # no entry is larger than its row's or its column's on the diagonal
        if not bool(torch.isfinite(mean_II.diagonal()).all()):
            raise PruningError(
                f"Hessian of {name} ({num_tokens} tokens) is not finite: the layer's inputs contain NaN "
                "or infinity; load the model in another dtype (float32 or bfloat16 instead of float16) or check its "
                "weights"
            )
        return Hessian(mean_II, num_tokens, num_assumed)


def _multiplies_halves(device: torch.device) -> bool:
    """Whether a product of half-precision matrices can be summed and given in float32: CUDA from torch 2.8 on."""
    return device.type == "cuda" and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


@dataclass(frozen=True)
class Statistics:
    """The folder that `capture_statistics` filled."""

    folder: Path

    def load(self, name: str, device: torch.device) -> tuple[Hessian, Hessian | None]:
        """The Hessian of the inputs of the linear `name`, and that of the held-out samples if there were any."""
        tensors = load_file(self.file(name), device=str(device))
        assumed = int(tensors.get("assumed_tokens", 0))
        hessian = Hessian(tensors["matrix"], int(tensors["num_tokens"]), assumed)
        if "heldout_matrix" not in tensors:
            return hessian, None
        return hessian, Hessian(tensors["heldout_matrix"], int(tensors["heldout_num_tokens"]))

    def file(self, name: str) -> Path:
        """The safetensors of the linear `name`: matrix, num_tokens, assumed_tokens if there are any, and heldout_... if
        there were held-out samples."""
        return self.folder / f"{name}.safetensors"
