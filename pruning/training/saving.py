"""When the Trainer writes a checkpoint, and when that counts as whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pruning.training.durable import mark_complete
from pruning.training.watching import Along, Best, best_step, curves_of

_ALONG_FILE = "along.safetensors"
#: seconds of training before a checkpoint, at least, and how many times as long as the last one took to write
_SECONDS, _TIMES = 60.0, 20


def load_along_(along: Along, checkpoint: Path) -> None:
    """Give it the state that lies in a whole checkpoint."""
    along.load_(load_file(checkpoint / _ALONG_FILE))


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint complete once the Trainer has written all of it, and what goes along lies beside it."""

    def __init__(self, identity: str, best: Best, along: Along | None = None) -> None:
        self._identity, self._best, self._along = identity, best, along

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark it."""
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._along is not None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._along.state().items()}
            save_file(tensors, folder / _ALONG_FILE)
        mark_complete(folder, self._identity)
        heldout = curves_of(state.log_history).get("heldout_loss")
        if self._best.enabled and heldout:
            self._best.drop_others(best_step(heldout))


class SavesInTime(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint once a minute, or less often where writing them would take a twentieth of the time.

    Comes after `Checkpoints`, whose work counts. The first process of a group decides for all.
    """

    def __init__(self) -> None:
        self._trains_since = self._asked = time.monotonic()
        self._writing = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock starts."""
        self._trains_since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for one, if it is time."""
        due = time.monotonic() - self._trains_since >= max(_SECONDS, _TIMES * self._writing)
        if args.world_size > 1:
            decided = torch.tensor(int(due), device=args.device)
            dist.broadcast(decided, src=0)
            due = bool(decided)
        if due:
            control.should_save, self._asked = True, time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See how long it took."""
        self._trains_since = time.monotonic()
        self._writing = max(0.0, self._trains_since - self._asked)
