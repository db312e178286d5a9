"""How a model is run for a profile: its attention implementation, and torch.compile."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from evaluation.errors import EvaluationError
from evaluation.generation import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_compiler(device: str | torch.device) -> None:
    """Raise EvaluationError if torch.compile cannot work on the device: it needs a C++ compiler for the CPU and Triton
    for an accelerator."""
    if torch.device(device).type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise EvaluationError(
                "profile: compile: true needs a C++ compiler and none was found; install g++, or set compile: false"
            ) from error
    elif importlib.util.find_spec("triton") is None:
        raise EvaluationError(
            f"profile: compile: true on {device} needs the package triton; install it, or set compile: false"
        )


def set_attention_(model: PreTrainedModel, attn_implementation: str | None) -> None:
    """Change how the model computes attention; None leaves it. Raises EvaluationError if the model has no such way."""
    if attn_implementation is None:
        return
    try:
        model.set_attn_implementation(attn_implementation)
    except (ValueError, ImportError) as error:
        raise EvaluationError(f"attn_implementation {attn_implementation!r}: {error}") from error
    if model.config._attn_implementation != attn_implementation:  # transformers only warns
        raise EvaluationError(
            f"{type(model).__name__} cannot change its attention to {attn_implementation!r}; "
            f"leave attn_implementation out for its own, {model.config._attn_implementation!r}"
        )


def runner_of(model: PreTrainedModel, *, compiled: bool) -> Runner:
    """The model as it is, or with its forward pass compiled: for any length, since the cache grows with each token."""
    return Runner(model, torch.compile(model, dynamic=True) if compiled else model)
