"""The Hugging Face Trainer, made resumable and quiet: killed at any moment, the next run ends with the same bits."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerState, TrainingArguments

from pruning.checkpoints.save_load import no_progress_bars
from pruning.errors import PruningError
from pruning.host_memory import kept_memory
from pruning.sharding import ShardableTrainer, is_in_pieces, part_
from pruning.training.batches import Batch, Examples, batches, collate, count_predicted
from pruning.training.durable import Best, newest_complete_
from pruning.training.objectives import CrossEntropy, Objective, precision
from pruning.training.options import CHECKPOINTS_AT_ONCE, Curves, TrainingConfig, TrainingRun
from pruning.training.watching import (
    Along,
    BeforeSteps,
    Checkpoints,
    Heldout,
    Reporter,
    SavesInTime,
    StopDiverging,
    Watched,
    curves_of,
    load_along_,
)

log = logging.getLogger("slimline")

_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "adafactor": "adafactor"}
#: times as slow that bfloat16 may be without a word
_MUCH_SLOWER = 2


@dataclass(frozen=True)
class Outcome:
    """What a training came to: its curves, and the step whose weights the model has."""

    curves: Curves
    num_steps: int
    kept_step: int
    final_loss: float


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
    objective: Objective,
    examples: Examples,
    heldout: Examples | None,
    config: TrainingConfig,
    run: TrainingRun,
    *,
    pad_id: int,
    identity: str,
    along: Along | None = None,
    watched: Examples | None = None,
) -> Outcome:
    """Train in place what requires gradients; the loss of a step is the objective's mean over its predicted tokens.

    identity: names this very run; checkpoints of another identity or half-written ones in run.scratch are removed, and
    from the newest good one it goes on. along: what prunes the model meanwhile, so that the loss may rise. watched:
    examples whose cross entropy is taken whenever the held-out ones are looked at. Call it within `seeded`. Raises
    PruningError if the loss is not finite or keeps rising, a device the Trainer cannot use, or a batch that cannot be
    split over the processes.
    """
    sharded = is_in_pieces(model)
    arguments = training_arguments(config, len(examples), run, saves=not sharded)
    if config.dtype == "bfloat16" and arguments.use_cpu and (slower := emulated_bfloat16()) > _MUCH_SLOWER:
        log.warning(
            "this CPU has no bfloat16 products: they take %.0f times as long as those of float32; set dtype: float32",
            slower,
        )
    best = Best(model, run, identity, enabled=config.keep == "best")
    reporter = Reporter(run)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=collate(pad_id),
        callbacks=[Checkpoints(identity, best, along), StopDiverging(run, rises=along is not None), reporter],
    )
    trainer.objective, trainer.along = objective, along
    trainer.remove_callback(PrinterCallback)
    if sharded or config.save_steps is None:
        trainer.add_callback(SavesInTime(config.save_steps))
    every = config.heldout_steps or max(1, arguments.max_steps // 10)
    if watched is not None:
        other_loss = _MeanLoss(model, CrossEntropy(), watched, config, run, pad_id)
        trainer.add_callback(Watched(trainer, other_loss, every))
    if heldout is not None and len(heldout):
        mean_loss = _MeanLoss(model, objective, heldout, config, run, pad_id)
        trainer.add_callback(Heldout(trainer, mean_loss, every, config.patience, best))
    if along is not None:
        trainer.add_callback(BeforeSteps(along))
    checkpoint = newest_complete_(run.scratch, identity)
    if along is not None and checkpoint:
        load_along_(along, checkpoint)
    state = checkpoint and TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if checkpoint and state and (state.global_step >= state.max_steps or _ended_early(state)):
        # resumed at its very end, Trainer.train would take one step too many
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        with no_progress_bars(), kept_memory(arguments.device):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if reporter.raised is not None:
            raise reporter.raised
        state = trainer.state
    curves = curves_of(state.log_history)
    losses = curves["train_loss"]
    kept = best.load_(curves) if config.keep == "best" else losses[-1][0]
    return Outcome(curves, losses[-1][0], kept, losses[-1][1])


@cache
def emulated_bfloat16() -> float:
    """How many times as long as in float32 this CPU takes for a product in bfloat16: 27 on one that has to emulate it,
    less than 1 on one that does not."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = (torch.ones(size, dtype=dtype) for size in ((128, 512), (512, 512)))
        took = []
        for _ in range(3):
            began = time.perf_counter()
            left @ right
            took.append(time.perf_counter() - began)
        return min(took)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def count_steps(num_examples: int, config: TrainingConfig) -> int:
    """Optimizer steps of a run; max_steps, if given, overrides epochs."""
    return config.max_steps or math.ceil(math.ceil(num_examples / config.batch_size) * config.epochs)


def check_device(run: TrainingRun) -> torch.device:
    """The device. Raises PruningError for one that the Trainer cannot use."""
    device = torch.device(run.device)
    if device.type not in ("cpu", "cuda") or (device.index and run.num_processes == 1):
        raise PruningError(f"cannot train on {device}: use cpu or cuda, and choose GPUs with CUDA_VISIBLE_DEVICES")
    return device


def training_arguments(
    config: TrainingConfig, num_examples: int, run: TrainingRun, *, saves: bool = True
) -> TrainingArguments:
    """The Trainer's own options. saves: whether it saves after config.save_steps by itself. Raises PruningError for a
    device that it cannot use, or a batch that the processes cannot share."""
    device = check_device(run)
    config.check_optimizer(device.type == "cuda")
    at_once = config.micro_batch_size * run.num_processes
    if config.batch_size % at_once:
        raise PruningError(
            f"batch_size {config.batch_size} is not a multiple of the {at_once} examples that {run.num_processes} "
            f"processes take at once: change batch_size or micro_batch_size ({config.micro_batch_size})"
        )
    num_steps = count_steps(num_examples, config)
    names = {"constant": "constant_with_warmup", "cosine": "cosine_with_min_lr" if config.final_learning_rate else ""}
    arguments = TrainingArguments(
        output_dir=str(run.scratch),
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // at_once,
        num_train_epochs=config.epochs,
        max_steps=num_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=names.get(config.schedule) or config.schedule,
        lr_scheduler_kwargs={"min_lr_rate": config.final_learning_rate} if config.final_learning_rate else {},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=_OPTIMIZERS[config.optimizer],
        bf16=config.dtype == "bfloat16",
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and run.num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps" if config.save_steps and saves else "no",  # or when it is asked (watching.py)
        save_steps=config.save_steps or num_steps,
        save_total_limit=CHECKPOINTS_AT_ONCE - 1,  # the last may be half-written when the run is killed
        logging_steps=1,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
    )
    # several GPUs are used by as many processes, never by torch's DataParallel
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Trainer(ShardableTrainer):
    """The Trainer with an objective of ours, normalised over the whole accumulated batch of all processes."""

    objective: Objective
    along: Along | None
    loss_is_scaled_for_ga = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # so that it counts the labels of the accumulated batch
        self._clock, self._tokens = time.monotonic(), 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Share of this micro batch in the mean over all predicted tokens of the optimizer step."""
        assert num_items_in_batch is not None, "only asked for while training"
        self._tokens += inputs["input_ids"].numel() * self.args.world_size
        # DDP averages gradients over the processes, and the number of items is that of all of them
        share: Tensor = self.objective(model, inputs) * self.args.world_size / num_items_in_batch
        return share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the speed since the last optimizer step, padding included."""
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = self._tokens / max(1e-9, now - self._clock)
            self._clock, self._tokens = now, 0
            logs |= self.along.figures() if self.along else {}
        super().log(logs, start_time)


def _ended_early(state: TrainerState) -> bool:
    return any(entry.get("patience_lost") for entry in state.log_history)


class _MeanLoss:
    """An objective's mean over all predicted tokens of examples that are not trained on, of all processes."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        examples: Examples,
        config: TrainingConfig,
        run: TrainingRun,
        pad_id: int,
    ) -> None:
        self._model, self._objective, self._examples = model, objective, examples
        self._config, self._run, self._pad_id = config, run, pad_id

    def __call__(self) -> float:
        """In nats per token; the model is left in the mode it was in."""
        device, training = torch.device(self._run.device), self._model.training
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        mine = range(self._run.rank, len(self._examples), self._run.num_processes)
        self._model.eval()
        with torch.no_grad(), precision(device, self._config.dtype == "bfloat16"):
            for batch in batches(self._examples, mine, self._config.micro_batch_size, self._pad_id):
                here = {name: value.to(device) for name, value in batch.items()}
                totals[0] += self._objective(self._model, here).double()
                totals[1] += count_predicted(here)
            if self._lacks_a_batch(len(mine)):  # the others' pieces come together when all processes compute
                batch = next(batches(self._examples, [0], 1, self._pad_id))
                self._objective(self._model, {name: value.to(device) for name, value in batch.items()})
        part_(self._model)
        self._model.train(training)
        if self._run.num_processes > 1:
            dist.all_reduce(totals)
        return float(totals[0] / totals[1])

    def _lacks_a_batch(self, mine: int) -> bool:
        """Whether this process has one batch less than the first, of a model in pieces."""
        first = math.ceil(len(self._examples) / self._run.num_processes)
        size = self._config.micro_batch_size
        return is_in_pieces(self._model) and math.ceil(mine / size) < math.ceil(first / size)
