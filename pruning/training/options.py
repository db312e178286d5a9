"""Options that all trainings share, and what the machine decides. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pruning.bounds import Amount, Count, Real, Seed
from pruning.errors import PruningError
from pruning.training.data import Watched, WatchedText

if TYPE_CHECKING:
    import torch

Optimizer = Literal["adamw", "adamw_8bit", "adafactor"]

#: a Trainer's checkpoint holds the weights and two moments of each; two are kept while a third is written
CHECKPOINTS_AT_ONCE = 3
_STATES, _FLOAT_BYTES, _TOKEN_BYTES = 3, 4, 4

#: metric -> (optimizer step, value) of every point, in order
Curves = dict[str, tuple[tuple[int, float], ...]]


class TrainingConfig(BaseModel):
    """What every training is asked. batch_size: examples per optimizer step over all devices; micro_batch_size: per
    forward pass of one device, a divisor of it.

    epochs: passes over the examples. max_steps: optimizer steps, None for `epochs`. final_learning_rate: share of
    learning_rate that a cosine ends at. dtype: of the forward and backward pass (autocast; what is trained and the
    optimizer stay float32). gradient_checkpointing: activations are computed again instead of kept. optimizer:
    adamw_8bit needs bitsandbytes and a GPU. save_steps: between resumable checkpoints, None for one a minute, or fewer
    where writing them would take a twentieth of the time and more. num_heldout: examples that are not trained on, whose
    loss is watched; heldout_steps: between two looks, None for every tenth of the run. patience: looks without a better
    loss after which the training ends, None for never. keep: the weights of the last step, or those of the best
    held-out loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Real = Field(1.0, gt=0, le=1e6)
    max_steps: Count | None = None
    learning_rate: Real = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate: Real = Field(0.0, ge=0, le=1)
    warmup_steps: Amount = 10
    weight_decay: Real = Field(0.0, ge=0)
    max_grad_norm: Real = Field(1.0, gt=0)
    batch_size: Count = 64
    micro_batch_size: Count = 4
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = False
    optimizer: Optimizer = "adamw"
    save_steps: Count | None = None
    num_heldout: Amount = 0
    heldout_steps: Count | None = None
    patience: Count | None = None
    keep: Literal["last", "best"] = "last"
    seed: Seed = Field(0, ge=0, lt=2**32)  # what numpy takes

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.batch_size % self.micro_batch_size:
            raise PruningError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if not self.watches_heldout and (self.keep == "best" or self.patience is not None):
            asked = "keep: best" if self.keep == "best" else f"patience: {self.patience}"
            raise PruningError(f"{asked} judges by held-out examples, and num_heldout is 0: give it a number")
        if self.final_learning_rate and self.schedule != "cosine":
            raise PruningError(
                f"final_learning_rate {self.final_learning_rate:g} is where a cosine ends, and schedule is "
                f"{self.schedule!r}: leave one of the two out"
            )
        return self

    @property
    def watches_heldout(self) -> bool:
        """Whether there are examples to judge by."""
        return self.num_heldout > 0

    def check_context(self, option: str, length: int, context: int | None) -> None:
        """Raise PruningError for examples that are longer than the model's context (None: it is not known)."""
        if context is not None and length > context:
            raise PruningError(f"{option} {length} is longer than the model's context of {context}: lower it")

    def check_optimizer(self, on_gpu: bool) -> None:
        """Raise PruningError for an optimizer that this machine does not have."""
        if self.optimizer == "adamw_8bit" and not (on_gpu and find_spec("bitsandbytes")):
            missing = "bitsandbytes is not installed (pip install bitsandbytes)" if on_gpu else "there is none"
            raise PruningError(
                f"optimizer adamw_8bit needs bitsandbytes and a CUDA device, and {missing}: take adafactor or adamw"
            )

    def may_be_sharded(self, num_processes: int, sharded: bool | None) -> bool:
        """Whether all weights could be trained in pieces over the processes. sharded: as of TrainingRun; raises
        PruningError where it asks for what this optimizer does not know."""
        if num_processes == 1 or sharded is False:
            return False
        if sharded and self.optimizer != "adamw":
            raise PruningError(
                f"optimizer {self.optimizer} knows whole weights only, and with SLIMLINE_TRAIN_SHARDED they lie in "
                "pieces: take adamw, or unset it"
            )
        return self.optimizer == "adamw"

    def checkpoint_bytes(self, num_trained: int) -> int:
        """What the checkpoints of a training of so many parameters take on the disk at most, with the best weights."""
        best = 2 if self.keep == "best" else 0
        return (CHECKPOINTS_AT_ONCE * _STATES + best) * _FLOAT_BYTES * num_trained


def _no_progress(share: float, message: str) -> None:
    pass


def _no_sink(step: int, values: Mapping[str, float]) -> None:
    pass


@dataclass(frozen=True)
class TrainingRun:
    """What the machine decides about one training; none of it changes what is learnt.

    scratch: a folder for checkpoints; a run killed at any moment goes on there when called again with the same
    arguments, and ends with the same weights. device: "cpu" or "cuda" (of this process). progress: called with the
    share done; what it raises ends the training after that step, with a checkpoint, and passes on. curves: called with
    the optimizer step and values by metric as they come. beside: a folder for what is kept beside the model. rank,
    num_processes: of the group of torch.distributed that this process has joined; rank 0 writes. sharded: whether a
    training of all weights lies in pieces over the processes (FSDP2) or whole in each (DDP); None: in pieces where it
    does not fit otherwise.
    """

    scratch: Path
    device: torch.device | str = "cpu"
    progress: Callable[[float, str], None] = field(default=_no_progress)
    curves: Callable[[int, Mapping[str, float]], None] = field(default=_no_sink)
    beside: Path | None = None
    rank: int = 0
    num_processes: int = 1
    sharded: bool | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


class WatchingConfig(TrainingConfig):
    """A training that can look at another text meanwhile. watch: that text; its loss is taken as often as the held-out
    one, every `heldout_steps`, and decides nothing."""

    watch: Watched | None = Field(default=None, exclude_if=lambda watch: watch is None)

    @property
    def watches(self) -> tuple[WatchedText, ...]:
        """What it reads and does not learn from."""
        return (self.watch,) if self.watch else ()

    def check_watched(self, context: int | None) -> None:
        """Raise PruningError for watched windows that are longer than the model's context."""
        if self.watch:
            self.check_context("watch.seq_len", self.watch.seq_len, context)


class TextConfig(TrainingConfig):
    """A training on running text. num_tokens: how many are trained on, in windows of seq_len, each seen `epochs` times.

    cross_document_attention: whether tokens see what stands before their own document in the window.
    """

    num_tokens: Count = 100_000_000
    seq_len: Annotated[Count, Field(ge=2)] = 2048
    cross_document_attention: bool = False

    @model_validator(mode="after")
    def _one_window(self) -> TextConfig:
        if self.num_tokens < self.seq_len:
            raise PruningError(
                f"num_tokens {self.num_tokens} is less than one window of seq_len {self.seq_len}: raise it"
            )
        return self

    @property
    def packed_bytes(self) -> int:
        """What the tokens take on the disk."""
        return _TOKEN_BYTES * (self.num_tokens + self.num_heldout * self.seq_len)


def with_preset(presets: Mapping[str, Mapping[str, Any]]) -> Callable[[Any], Any]:
    """A validator that reads `preset`, the name of settings in which single options may be given otherwise."""

    def expand(options: Any) -> Any:
        if not isinstance(options, dict) or "preset" not in options:
            return options
        name = options["preset"]
        if not isinstance(name, str) or name not in presets:
            raise PruningError(f"unknown preset {name!r}; available: {', '.join(presets)}")
        return {**presets[name], **{key: value for key, value in options.items() if key != "preset"}}

    return expand
