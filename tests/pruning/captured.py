"""What the pruning tests share: calibration windows, Hessians by forward hooks alone, a pruned copy of a model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.families import family_of
from pruning.methods import slimgpt
from pruning.obs import elimination
from pruning.recovery import RecoveryInputs
from pruning.statistics.hessian import Hessian
from pruning.training.options import TrainingRun
from pruning.walk.options import WalkOptions
from pruning.walk.state import MemoryWalkState, Pruned
from tests.tiny import random_ids, tiny_tokenizer


def prepared(name: str, weight_OI: Tensor, hessian: Hessian, **dampening: Any) -> elimination.Problem:
    """The linear of that weight and Hessian, dampened and ready for elimination."""
    return elimination.prepare(elimination.dampen(name, weight_OI, hessian, **dampening))


#: what the methods that train read, and a training of it that takes no time
RECORDS = [
    {"instruction": f"What is {i} and {i}?", "input": "" if i % 2 else "Add them.", "output": f"It is {2 * i}."}
    for i in range(16)
]
TRAINING: dict[str, Any] = {
    "data": {"dataset": "records", "template": "alpaca"}, "batch_size": 4, "micro_batch_size": 2, "max_steps": 3,
    "learning_rate": 1e-3, "warmup_steps": 1, "dtype": "float32",
}  # fmt: skip
#: options without which a method does nothing to models of three layers, or takes long
ON_THREE_LAYERS: dict[str, dict[str, Any]] = {
    "llm_pruner": {"protect_first": 1, "protect_last": 0},
    "loraprune": TRAINING,
    "compresso": TRAINING,
}
CPU = WalkOptions(device=torch.device("cpu"), batch_size=3)


def windows(model: PreTrainedModel, num_samples: int = 6, num_heldout: int = 2, seq_len: int = 24) -> CalibrationSet:
    ids_NL = random_ids(model, num_samples + num_heldout, seq_len, seed=7)
    return CalibrationSet(ids_NL[:num_samples].clone(), ids_NL[num_samples:].clone(), {"dataset": "random"})


def outputs(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every o_proj and down_proj by its dotted name, in the order of the walk."""
    family = family_of(model)
    mlp = f".{family.mlp_name}" if family.mlp_name else ""
    ends = (f".{family.attention_name}.{family.o_name}", f"{mlp}.{family.down_name}")
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}  # type: ignore[misc]


@contextmanager
def recorded_inputs(model: PreTrainedModel) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of every output linear, (T, I) float64 per forward of the whole model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in outputs(model)}
    handles = [
        linear.register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].detach().double().flatten(0, -2))
        )
        for name, linear in outputs(model).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hooked_moments(model: PreTrainedModel, ids_NL: Tensor) -> dict[str, Tensor]:
    """Mean of x xᵀ of every output linear's inputs in the model's own forward, float64."""
    with recorded_inputs(model) as seen:
        model(ids_NL)
    return {name: X_TI.T @ X_TI / len(X_TI) for name, (X_TI,) in seen.items()}


@torch.no_grad()
def logits(model: PreTrainedModel, ids_NL: Tensor) -> Tensor:
    return model(ids_NL).logits  # type: ignore[no-any-return]


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """As if loaded in it: the rotary tables stay in float32, which `model.to` would not leave so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    state, others = one.state_dict(), other.state_dict()
    return list(state) == list(others) and all(torch.equal(value, others[name]) for name, value in state.items())


def prune_copy(
    model: PreTrainedModel,
    config: BaseModel,
    calibration: CalibrationSet | None = None,
    *,
    method: ModuleType = slimgpt,
    statistics: Path | None = None,
    options: WalkOptions = CPU,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> tuple[PreTrainedModel, Pruned]:
    """A masked copy of the model and how it was pruned; the model itself must come out of it as it went in. A method
    that trains prunes the copy in place."""
    before, modules, walk_state = copy.deepcopy(model), dict(model.named_modules()), MemoryWalkState()
    if hasattr(method, "train"):
        with tempfile.TemporaryDirectory() as scratch:
            run = TrainingRun(Path(scratch), progress=progress)
            return before, method.train(before, tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, run)
    try:
        pruned = method.prune(
            ResidentDecoder(model),
            calibration or windows(model),
            config,
            statistics=statistics,
            options=options,
            walk_state=walk_state,
            progress=progress,
        )
    finally:
        assert same_weights(model, before)
        assert dict(model.named_modules()) == modules
    walk_state.apply_(before)
    return before, pruned
