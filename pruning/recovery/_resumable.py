"""The Hugging Face Trainer, made resumable and quiet: killed at any moment, the next run ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pruning.errors import PruningError
from pruning.recovery._records import Example, collate

Progress = Callable[[float, str], None]
MARKER = "complete.json"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random states set to a seed and put back afterwards: peft and the Trainer draw from them."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    arguments: TrainingArguments,
    *,
    batch_size: int,
    pad_id: int,
    identity: str,
    progress: Progress,
) -> tuple[tuple[int, float], ...]:
    """Train in place and return (step, loss) of every optimizer step, those before an interruption included.

    batch_size: examples per optimizer step over all devices. identity: names this very run; checkpoints of another
    identity or half-written ones in arguments.output_dir are removed, and from the newest good one it goes on.
    progress: what it raises ends the training after that step, of which there is a checkpoint then, and passes on.
    Raises PruningError if the loss is not finite or the batch cannot be split over the devices.
    """
    at_once = arguments.train_batch_size * arguments.world_size
    if batch_size % at_once:
        raise PruningError(
            f"batch_size {batch_size} is not a multiple of the {at_once} examples the devices take at once: "
            "change batch_size or micro_batch_size"
        )
    arguments.gradient_accumulation_steps = batch_size // at_once
    reporter = _Reporter(progress)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(examples),
        data_collator=collate(pad_id),
        callbacks=[_Checkpoints(identity), _FiniteLoss(), reporter],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = newest_complete_(Path(str(arguments.output_dir)), identity)
    state = checkpoint and TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if checkpoint and state and state.global_step >= state.max_steps:
        # resumed at its very end with max_steps given, Trainer.train would take one step too many
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if reporter.raised is not None:
            raise reporter.raised
        state = trainer.state
    return tuple((entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry)


def count_steps(num_examples: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run; max_steps, if given, overrides epochs."""
    return max_steps or math.ceil(math.ceil(num_examples / batch_size) * epochs)


def identity_of(model: nn.Module, examples: Sequence[Example], config_json: str) -> str:
    """A digest of what decides a run's outcome: config, examples, shapes and a sample of the weights."""
    digest = hashlib.sha256(config_json.encode())
    for example in examples:
        digest.update(repr((example.ids, example.num_prompt)).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {sample.tolist()}".encode())
    return digest.hexdigest()


def newest_complete_(folder: Path, identity: str) -> Path | None:
    """The newest whole checkpoint of this run; all others of no use are deleted."""
    newest: tuple[int, Path] | None = None
    for path in folder.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if not step.isdigit() or not _is_complete(path, identity):
            shutil.rmtree(path, ignore_errors=True)
        elif newest is None or int(step) > newest[0]:
            newest = (int(step), path)
    return newest and newest[1]


def _is_complete(checkpoint: Path, identity: str) -> bool:
    try:
        marker = json.loads((checkpoint / MARKER).read_bytes())
        return bool(marker == {"identity": identity, "files": _digests(checkpoint, marker["files"])})
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _digests(checkpoint: Path, names: Any) -> dict[str, str]:
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in sorted(names)}


class _Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint complete once the Trainer has written all of it."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        files = _digests(checkpoint, [path.name for path in checkpoint.iterdir() if path.name != MARKER])
        aside = checkpoint / f"{MARKER}.aside"
        aside.write_text(json.dumps({"identity": self.identity, "files": files}), encoding="utf-8")
        os.replace(aside, checkpoint / MARKER)


class _FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stops a run that has diverged. Runs before a checkpoint of that step would be written."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise PruningError(
                f"the training loss became {loss} at step {state.global_step}: "
                f"lower learning_rate (now {args.learning_rate:g}) or train in float32"
            )


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Reports progress to the caller; what the caller raises ends the training, with a checkpoint, and is passed on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.raised: Exception | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" in (logs or {}):
            words = f"step {state.global_step}/{state.max_steps}, loss {(logs or {})['loss']:.3f}"
            try:
                self.progress(state.global_step / state.max_steps, words)
            except Exception as error:
                self.raised = error
                control.should_save = control.should_training_stop = True
