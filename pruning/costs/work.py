"""What pruning costs, counted: products by precision, and the bytes that kernels and disks move.

Divided by what a machine does in a second (`Rates`) these are seconds, one thing after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

from pruning.families import LayerCost
from pruning.obs.elimination import COMPACT_SHARE
from pruning.plan import LayerShape
from pruning.statistics.hessian import BLOCK

#: times that an element of the stream, of a head and of a channel is read or written by element-wise kernels on the way
#: through a layer (norms in float32, rotation, activation, sums) and by the walk, which keeps each once
_STREAM_PASSES, _HEAD_PASSES, _CHANNEL_PASSES = 36, 19, 9


@dataclass(frozen=True)
class Work:
    """Floating-point operations by the precision of the products, and bytes."""

    model_flops: float = 0.0
    """In the model's dtype."""
    float32_flops: float = 0.0
    """Of second moments and errors."""
    float64_flops: float = 0.0
    """Of the solver."""
    memory_bytes: float = 0.0
    """Read and written by element-wise kernels where the model computes."""
    disk_bytes: float = 0.0
    """Read and written in files."""

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, field by field as in `Work`. All above zero."""

    model_flops: float
    float32_flops: float
    float64_flops: float
    memory_bytes: float
    disk_bytes: float

    def seconds(self, work: Work) -> float:
        """For this work, one thing after another."""
        return float(sum(amount / rate for amount, rate in zip(astuple(work), astuple(self), strict=True)))


@dataclass(frozen=True)
class DecoderSize:
    """What the cost of a decoder depends on. item_bytes: of one weight."""

    shapes: tuple[LayerShape, ...]
    cost: LayerCost
    head_dim: int
    hidden_size: int
    vocab_size: int
    item_bytes: int

    @property
    def layer_bytes(self) -> int:
        """Of the weights of all layers."""
        return sum(map(self.cost.parameters, self.shapes)) * self.item_bytes

    def inputs(self, shape: LayerShape) -> tuple[int, int]:
        """Of the output linears of attention and MLP."""
        return shape.num_heads * self.head_dim, shape.intermediate_size


@dataclass(frozen=True)
class Windows:
    """Of a calibration: tokens that give statistics, tokens that are held out, and tokens per window."""

    tokens: int
    heldout: int
    seq_len: int

    @property
    def total(self) -> int:
        """Both."""
        return self.tokens + self.heldout


def forward_work(size: DecoderSize, windows: Windows) -> Work:
    """Of all tokens once through all layers, without the head: a causal attention looks at half of its window."""
    total = Work()
    for shape in size.shapes:
        attention, channels = size.inputs(shape)
        products = 2.0 * size.cost.parameters(shape) + 2.0 * attention * windows.seq_len
        heads = attention + shape.num_kv_heads * size.head_dim
        elements = _STREAM_PASSES * size.hidden_size + _HEAD_PASSES * heads + _CHANNEL_PASSES * channels
        total += Work(
            model_flops=products * windows.total, memory_bytes=float(elements * size.item_bytes * windows.total)
        )
    return total


def moments_work(num_inputs: int, tokens: int) -> Work:
    """Of the second moments of so many inputs: the blocks up to the diagonal."""
    return Work(
        float32_flops=float(tokens) * num_inputs * (num_inputs + min(num_inputs, BLOCK)),
        memory_bytes=4.0 * tokens * num_inputs,
    )


def solver_work(num_inputs: int, num_outputs: int, rounds: Iterable[int]) -> Work:
    """Of inverse, greedy elimination and refit in float64. rounds: columns that go in each."""
    inputs, outputs = float(num_inputs), float(num_outputs)
    flops, moved = inputs**3, 0.0
    active, left = inputs, inputs
    for gone in rounds:
        left -= gone
        if active - left > COMPACT_SHARE * active:
            active = left
        flops += gone * gone * (active + outputs) + 2.0 * gone * active * (active + outputs)
        moved += 3.0 * 8 * active * (active + outputs)
    flops += 2.0 * outputs * inputs * left + left**3 / 3 + 2.0 * outputs * left**2
    return Work(float64_flops=flops, memory_bytes=moved)


def judging_work(size: DecoderSize, windows: Windows) -> Work:
    """Of the KL between two models' logits on the held-out windows: the head twice, and the softmax."""
    logits = float(windows.heldout * size.vocab_size)
    return Work(model_flops=4.0 * logits * size.hidden_size, memory_bytes=10 * 4 * logits)


def as_float32(work: Work) -> Work:
    """The same with the solver in single precision, as trials are solved."""
    single = work.float32_flops + work.float64_flops
    return replace(work, float32_flops=single, float64_flops=0.0, memory_bytes=work.memory_bytes / 2)
