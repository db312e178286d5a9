"""Compresso: L0 gates on heads and channels, trained with LoRA towards a sparsity (arXiv 2310.05015).

Each kv group (or query head) and each channel has a hard-concrete gate (arXiv 1712.01312); an augmented Lagrangian
holds the share of parameters that closed gates take, on average, to a target. In the end the gates below the threshold
that meets the sparsity by parameter count are removed, and what the others multiply with is folded into the weights.
The paper gates the hidden dimension too: here it stays, since all our checkpoints have their model's residual stream.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pruning.bounds import Real
from pruning.errors import PruningError
from pruning.gradual.options import TrainedOptions
from pruning.gradual.trained import Trained
from pruning.training.data import RecordData

if TYPE_CHECKING:
    from pruning.gradual.session import Make

VERSION = 1


class Config(TrainedOptions):
    """The options of Compresso; with records num_examples and max_length say how much is trained on, with text
    num_tokens and seq_len. All of them enter the cache key."""

    split: Literal["ffn", "attention"] | None = None
    """One of the two alone; default: whatever the gates say."""
    prompt: bool = False
    """Put a text in front of every record that says that the model is being pruned and shall answer well all the same;
    it is for the training alone."""
    target_warmup: Real = Field(default=0.5, ge=0, lt=1)
    """Share of the steps in which the target rises evenly from 0 to the sparsity."""
    gate_learning_rate: Real = Field(default=0.1, gt=0)
    """Of the gates (Adam); that of the adapters is learning_rate."""
    multiplier_learning_rate: Real = Field(default=1.0, ge=0)
    """Of the gradient ascent on the two multipliers."""
    penalty: Real = Field(default=200.0, ge=0)
    """Where the multiplier of the squared distance from the target begins; that of the distance begins at 0."""

    @model_validator(mode="after")
    def _prompts_records(self) -> Config:
        if self.prompt and not isinstance(self.data, RecordData):
            raise PruningError("prompt: true stands in front of instruction records, and data names text: leave it out")
        return self

    @property
    def measure(self) -> Literal["score", "per_parameter"] | None:
        """One threshold on the gates."""
        return "score"

    @property
    def prompted(self) -> bool:
        """By `prompt`."""
        return self.prompt


def _make(config: Config) -> Make:
    from pruning.gradual.gates import Gates, Pull

    return partial(Gates, Pull(**config.model_dump(include=set(Pull.__dataclass_fields__))))


_method = Trained(_make)
needs_statistics, order_config, reads = _method.needs_statistics, _method.order_config, _method.reads
check_model, check_training, scratch_bytes = _method.check_model, _method.check_training, _method.scratch_bytes
train = _method.train
