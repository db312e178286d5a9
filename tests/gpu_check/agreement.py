"""The device against the CPU, on tiny models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.protocol import WindowProtocol
from infra.settings import Settings
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import shrink_
from pruning.distributed import ProcessGroup
from pruning.methods import slimgpt
from pruning.recovery import RecoveryInputs, lora
from pruning.training.options import TrainingRun
from pruning.walk.durable_state import DurableWalkState
from pruning.walk.options import WalkOptions
from pruning.walk.state import MemoryWalkState, Pruned, WalkState
from tasks.execution.processes import Reports, run_processes
from tests.pruning.captured import RECORDS, TRAINING, windows
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

CONFIG = slimgpt.Config(sparsity=0.3, split="equal")
TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog, {i * i} times." for i in range(12)]
_STEPS = 2


@dataclass(frozen=True)
class _Outcome:
    """Of one device: what was kept, and what the smaller model gives before and after training."""

    pruned: Pruned
    logits: Tensor
    perplexity: float
    losses: tuple[float, ...]


def agreement_of_family(family: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Largest differences between the device and the CPU: of logits relative to their largest, of perplexity and of
    the losses of some steps of LoRA relative to the CPU's."""
    here, there = (_outcome(family, torch.device(each), folder / name) for name, each in _both(device))
    largest = float(here.logits.abs().max())
    return {
        "plan_equal": here.pruned.plan == there.pruned.plan,
        "logits": float((here.logits - there.logits).abs().max()) / largest if _alike(here, there) else float("inf"),
        "perplexity": abs(there.perplexity / here.perplexity - 1),
        "lora_loss": max(abs(b / a - 1) for a, b in zip(here.losses, there.losses, strict=True)),
    }


def _both(device: torch.device) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("here", "cpu"), ("there", str(device))


def _alike(one: _Outcome, other: _Outcome) -> bool:
    return one.logits.shape == other.logits.shape


def _outcome(family: str, device: torch.device, folder: Path) -> _Outcome:
    dense, walk_state = tiny_model(family), MemoryWalkState()
    pruned = _prune(dense, device, walk_state)
    walk_state.apply_(dense)
    shrink_(dense, pruned.plan)
    small = dense.to(device)
    with torch.no_grad():
        logits = small(random_ids(small, 4, 24).to(device)).logits.float().cpu()
    tokenizer, protocol = tiny_tokenizer(), WindowProtocol(window=16)
    scored = perplexity(small, tokenizer, TEXTS, protocol, EvalOptions(batch_size=3)).ppl
    losses: list[float] = []

    def note(step: int, values: Mapping[str, float]) -> None:
        losses.extend(value for name, value in values.items() if "loss" in name)

    config = lora.Config.model_validate(TRAINING | {"max_steps": _STEPS})
    kind = "cuda" if device.type == "cuda" else "cpu"
    run = TrainingRun(folder, device=kind, curves=note)
    lora.recover(copy.deepcopy(small).cpu(), tokenizer, RecoveryInputs(records=RECORDS), config, run)
    return _Outcome(pruned, logits, scored, tuple(losses))


def _prune(
    model: PreTrainedModel,
    device: torch.device,
    walk_state: WalkState,
    *,
    process_group: ProcessGroup | None = None,
    stop_after: int | None = None,
) -> Pruned:
    done = 0

    def progress(share: float, message: str) -> None:
        nonlocal done
        done += 1
        if done == stop_after:
            raise _Killed

    options = WalkOptions(device, 3, process_group=process_group or ProcessGroup())
    return slimgpt.prune(
        ResidentDecoder(model), windows(model), CONFIG, options=options, walk_state=walk_state, progress=progress
    )


class _Killed(Exception):
    pass


def resume_is_equal(device: torch.device, folder: Path) -> bool:
    """Whether a walk that ended after two layers of four goes on to the same bits."""
    model = tiny_model("llama", layers=4)
    whole = DurableWalkState(folder / "whole")
    _prune(model, device, whole)
    try:
        _prune(model, device, DurableWalkState(folder / "killed"), stop_after=2)
    except _Killed:
        again = DurableWalkState(folder / "killed")
        assert again.layers_done == 2
        _prune(model, device, again)
        return [shard.read_bytes() for shard in again.shards] == [shard.read_bytes() for shard in whole.shards]
    raise AssertionError("it was to be killed")


def two_processes_agree(device: torch.device, folder: Path) -> bool | None:
    """Whether two processes on two GPUs (NCCL) come to the plan of one; None with fewer than two."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    folder.mkdir(parents=True)
    alone = _prune(tiny_model("llama"), device, MemoryWalkState()).plan
    reports = Reports(lambda share, message: None, lambda *more: None)  # type: ignore[arg-type]
    run_processes(2, _Together(folder), Settings(device="auto"), reports, what="walk", kept="nothing is kept")
    return {path.read_text() for path in folder.glob("*.json")} == {alone.model_dump_json()}


@dataclass(frozen=True)
class _Together:
    folder: Path

    def __call__(self, process_group: ProcessGroup, device: torch.device, reports: Reports) -> None:
        pruned = _prune(tiny_model("llama"), device, MemoryWalkState(), process_group=process_group)
        (self.folder / f"{process_group.rank}.json").write_text(pruned.plan.model_dump_json())
