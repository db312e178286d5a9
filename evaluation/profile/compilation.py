"""How a model is run for a profile: where, its attention implementation, and torch.compile."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from evaluation.errors import EvaluationError
from evaluation.profile.timed_generation import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_GRAPHS = 256
"""Of one function in one profile. Two models, prompt and decoding, a batch of one and of several, all threads and half
of them make 16; a model that hooks cut into its layers has as many for each layer."""

_compiling = threading.Lock()


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


@contextmanager
def only_compiled(*, compiled: bool) -> Iterator[None]:
    """Inside, what is compiled runs compiled or not at all; does nothing if nothing is compiled.

    Dynamo's cache hangs on functions, which all models of a class share, and beyond a few graphs of one it goes on
    uncompiled. So the cache, which is the process's, is emptied first, and one thread at a time is inside. Raises
    EvaluationError where there would be too many graphs all the same.
    """
    if not compiled:
        yield
        return
    from torch import _dynamo as dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit

    options: dict[str, Any] = {"fail_on_recompile_limit_hit": True, "suppress_errors": False}
    options |= dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), _MOST_GRAPHS)
    with _compiling, dynamo.config.patch(options):
        dynamo.reset()
        try:
            yield
        except FailOnRecompileLimitHit as error:
            raise EvaluationError(
                f"profile: compile: true needs more than {_MOST_GRAPHS} graphs of one function, and the rest would run "
                "uncompiled; ask for fewer sizes at once, or set compile: false"
            ) from error


def place_(model: PreTrainedModel, device: str | torch.device) -> None:
    """Move the model to the device. One that was loaded with a device map stays where it is: it would be collapsed onto
    that device, for accelerate only warns."""
    if not getattr(model, "hf_device_map", None):
        model.to(device)


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether a device map put weights off the devices, to be fetched for each forward pass."""
    return any(parameter.is_meta for parameter in model.parameters())


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
