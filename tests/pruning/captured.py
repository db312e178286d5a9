"""What the pruning tests share: calibration windows for a tiny model, and its Hessians by forward hooks alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.calibration import CalibrationSet
from pruning.families import family_of
from pruning.sequential import WalkOptions
from tests.tiny import random_ids

CPU = WalkOptions(device=torch.device("cpu"), batch_size=3)


def windows(model: PreTrainedModel, num_samples: int = 6, num_heldout: int = 2, seq_len: int = 24) -> CalibrationSet:
    ids_NL = random_ids(model, num_samples + num_heldout, seq_len, seed=7)
    return CalibrationSet(ids_NL[:num_samples].clone(), ids_NL[num_samples:].clone(), {"dataset": "random"})


def outputs(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every o_proj and down_proj by its dotted name, in the order of the walk."""
    family = family_of(model)
    ends = (f".{family.attention_name}.{family.o_name}", f".{family.mlp_name}.{family.down_name}")
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
