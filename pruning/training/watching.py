"""What looks on while the Trainer trains: whole checkpoints in time, held-out loss, divergence, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pruning.errors import PruningError
from pruning.training.durable import Best, best_step, mark_complete
from pruning.training.options import Curves, TrainingRun

#: the Trainer's words for what is logged, and ours
_METRICS = {
    "loss": "train_loss",
    "heldout_loss": "heldout_loss",
    "watched_loss": "watched_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "sparsity": "sparsity",
    "expected_sparsity": "expected_sparsity",
    "multiplier": "multiplier",
}
#: a loss has diverged if its mean over so many steps is above its lowest such mean, or the held-out one above that
#: before training, by this factor and so many nats
_STEPS, _FACTOR, _NATS = 10, 1.5, 0.5
_ALONG_FILE = "along.safetensors"
#: seconds of training before a checkpoint, at least, and how many times as long as the last one took to write
_SECONDS, _TIMES = 60.0, 20


def curves_of(log_history: Sequence[dict[str, Any]]) -> Curves:
    """What was logged, by metric."""
    return {
        name: points
        for word, name in _METRICS.items()
        if (points := tuple((entry["step"], float(entry[word])) for entry in log_history if word in entry))
    }


class Along(Protocol):
    """What changes along with the trained weights, by rules of its own, and is kept and resumed with them."""

    def before_step(self, step: int) -> None:
        """Before the optimizer's step of that number, from 1 on: trained weights have the (clipped) gradients of the
        whole batch."""
        ...

    def figures(self) -> Mapping[str, float]:
        """What is to be seen of it after a step, by metric."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that its future depends on."""
        ...

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Be again what it was."""
        ...


class BeforeSteps(TrainerCallback):  # type: ignore[misc]
    """Lets an Along see the gradients of every optimizer step."""

    def __init__(self, along: Along) -> None:
        self._along = along

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """They are whole, and not yet zeroed."""
        self._along.before_step(state.global_step + 1)


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

    Comes after `Checkpoints`, whose work counts. The first process of a group decides for all. every: by steps instead,
    and at the end.
    """

    def __init__(self, every: int | None = None) -> None:
        self._every = every
        self._trains_since = self._asked = time.monotonic()
        self._writing = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock starts."""
        self._trains_since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for one, if it is time."""
        if self._every is not None:
            control.should_save |= state.global_step % self._every == 0 or state.global_step >= state.max_steps
            return
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


class Watched(TrainerCallback):  # type: ignore[misc]
    """Measures a loss before the first step, now and then, and at the end."""

    metric = "watched_loss"

    def __init__(self, trainer: Trainer, mean_loss: Callable[[], float], every: int) -> None:
        self._trainer, self._mean_loss, self._every = trainer, mean_loss, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where it stands before it learns."""
        if state.global_step == 0:
            self._look(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where it stands now, if it is time."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._look(state, control)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        self._log(control, {self.metric: self._mean_loss()})

    def _log(self, control: TrainerControl, values: dict[str, float]) -> None:
        should_log = control.should_log
        self._trainer.log(values)
        control.should_log = should_log  # which logging anything switches off


class Heldout(Watched):
    """The same of the held-out loss: keeps the best weights, ends what no longer learns."""

    metric = "heldout_loss"

    def __init__(
        self, trainer: Trainer, mean_loss: Callable[[], float], every: int, patience: int | None, best: Best
    ) -> None:
        super().__init__(trainer, mean_loss, every)
        self._patience, self._best = patience, best

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        loss = self._mean_loss()
        before = curves_of(state.log_history).get("heldout_loss", ())
        points = [*before, (state.global_step, loss)]
        best = best_step(points)
        if best == state.global_step:
            self._best.keep(best)
        since = len(points) - 1 - [step for step, _ in points].index(best)
        lost = self._patience is not None and since >= self._patience
        self._log(control, {self.metric: loss} | ({"patience_lost": 1.0} if lost else {}))
        if lost:
            control.should_training_stop = control.should_save = True


class StopDiverging(TrainerCallback):  # type: ignore[misc]
    """Stops a run that has diverged. Runs before a checkpoint of that step would be written. rises: the loss may do so,
    as while a model is pruned; then it only has to be finite."""

    def __init__(self, run: TrainingRun, *, rises: bool = False) -> None:
        self._run, self._rises = run, rises

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise PruningError for a loss that is not finite or keeps rising."""
        curves, loss = curves_of(state.log_history), (logs or {}).get("loss")
        if loss is None:
            heldout = [value for _, value in curves.get("heldout_loss", ())]
            if heldout and self._has_risen(heldout[-1], heldout[0]):
                self._refuse(
                    f"the held-out loss rose from {heldout[0]:.3f} to {heldout[-1]:.3f} at step {state.global_step}",
                    args,
                )
            return
        if not math.isfinite(loss):
            self._refuse(f"the training loss became {loss} at step {state.global_step}", args)
        losses = [value for _, value in curves["train_loss"]]
        means = [sum(losses[end - _STEPS : end]) / _STEPS for end in range(_STEPS, len(losses) + 1)]
        if means and self._has_risen(means[-1], min(means)):
            self._refuse(
                f"the training loss (mean of {_STEPS} steps) rose from {min(means):.3f} to {means[-1]:.3f} at step "
                f"{state.global_step}",
                args,
            )

    def _has_risen(self, loss: float, lowest: float) -> bool:
        return not math.isfinite(loss) or (not self._rises and loss > max(_FACTOR * lowest, lowest + _NATS))

    def _refuse(self, what: str, args: TrainingArguments) -> None:
        kept = [path for pattern in ("best-*", "checkpoint-*") for path in self._run.scratch.glob(pattern)]
        newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
        where = f"; the last good weights are kept in {newest}" if newest else ""
        raise PruningError(
            f"{what}: lower learning_rate (now {args.learning_rate:g}), raise warmup_steps or train in float32{where}"
        )


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Reports to the caller; what its progress raises ends the training, with a checkpoint, and is passed on."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self.raised: Exception | None = None
        self._heldout = ""
        self._began: tuple[float, int] | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hand on what was measured."""
        values = {_METRICS[word]: float(value) for word, value in (logs or {}).items() if word in _METRICS}
        if self._run.leads:
            self._run.curves(state.global_step, values)
        if "heldout_loss" in values:
            self._heldout = f", held-out {values['heldout_loss']:.3f}"
        if "train_loss" not in values:
            return
        words = f"step {state.global_step}/{state.max_steps}, loss {values['train_loss']:.3f}{self._heldout}"
        try:
            self._run.progress(state.global_step / state.max_steps, words + self._to_go(state))
        except Exception as error:
            self.raised = error
            control.should_save = control.should_training_stop = True

    def _to_go(self, state: TrainerState) -> str:
        now = time.monotonic()
        if self._began is None:
            self._began = (now, state.global_step)
            return ""
        began, step = self._began
        left = (now - began) / (state.global_step - step) * (state.max_steps - state.global_step)
        return f", {left / 60:.0f} min to go" if left >= 90 else f", {left:.0f} s to go"
