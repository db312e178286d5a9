"""LoRAPrune: importance from the gradients of LoRA, masks that grow step by step while it trains (arXiv 2305.18403).

What a weight is worth is estimated from the adapters' gradients alone, those that the optimizer is given (clipped), and
summed over all weights that go with a head or channel; a moving average over the steps decides. What is masked gives no
output and may come back while the training lasts. Afterwards the adapters are merged and the masked groups removed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pruning.bounds import Count, Real
from pruning.errors import PruningError
from pruning.gradual.options import TrainedOptions
from pruning.gradual.trained import Trained
from pruning.training.data import PlainText, TextsOrRecords

if TYPE_CHECKING:
    from pruning.gradual.session import Make

VERSION = 1


class Config(TrainedOptions):
    """The options of LoRAPrune; with text num_tokens and seq_len say how much is trained on, with records num_examples
    and max_length. All of them enter the cache key."""

    split: Literal["equal", "half", "third", "ffn", "attention"] | None = None
    """Attention against FFN: equal ratios, half or a third of the ratio for attention, or one of the two alone.
    Default: equal in every layer; with one threshold whatever is worth least."""
    allocation: Literal["uniform", "global"] = "uniform"
    """uniform: every layer loses the same share; global: one threshold on the importance per parameter."""
    decay: Real = Field(default=0.9, ge=0, lt=1)
    """Of the moving average over optimizer steps (lambda in the paper)."""
    initial_warmup: Real = Field(default=0.1, ge=0, lt=1)
    """Share of the steps before anything is masked."""
    final_warmup: Real = Field(default=0.1, ge=0, lt=1)
    """Share of the steps at the end with all masks in place; between the two the ratio rises as a cubic."""
    data: TextsOrRecords = PlainText(dataset="allenai/c4", config="en")
    num_tokens: Count = 10_240_000
    seq_len: Count = Field(default=512, ge=2)

    @model_validator(mode="after")
    def _room_to_prune(self) -> Config:
        if self.dora:
            raise PruningError(
                "dora: true learns the size of each weight apart, and its gradients do not say what a weight is worth: "
                "leave it out"
            )
        if self.initial_warmup + self.final_warmup >= 1:
            raise PruningError(
                f"initial_warmup {self.initial_warmup:g} and final_warmup {self.final_warmup:g} leave no steps to "
                "prune in: together they must be less than 1"
            )
        return self

    @property
    def measure(self) -> Literal["score", "per_parameter"] | None:
        """By `allocation`."""
        return "per_parameter" if self.allocation == "global" else None


def _make(config: Config) -> Make:
    from pruning.gradual.importance import LoraImportance, Pace

    pace = Pace(config.sparsity, config.decay, config.initial_warmup, 1 - config.final_warmup)
    return partial(LoraImportance, pace)


_method = Trained(_make)
needs_statistics, order_config, reads = _method.needs_statistics, _method.order_config, _method.reads
check_model, check_training, scratch_bytes = _method.check_model, _method.check_training, _method.scratch_bytes
train = _method.train
