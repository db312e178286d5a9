"""A random model pruned from folder to folder, once at full speed and once with every part waited for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from pruning.activations.pinned import Copies
from pruning.checkpoints.decoder import StreamedDecoder
from pruning.layerwise import prune as layerwise
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import slimgpt
from pruning.statistics.hessian import HessianAccumulator
from pruning.walk.durable_state import DurableWalkState
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import _Walk
from tests.bench.options import Shape, Windows
from tests.bench.random_tokens import random_calibration
from tests.bench.synthetic import write_checkpoint

_SPARSITY = 0.5


@dataclass(frozen=True)
class Size:
    """A model and the tokens that it is calibrated with."""

    shape: Shape
    tokens: Windows
    batch_size: int


#: of the layers of a 1B as many as take a minute or two; and for a machine without a GPU
BILLION = Size(Shape(2048, 8192, 32, 8, 32_000), Windows(128, 2048), 8)
SMALL = Size(Shape(64, 176, 4, 2), Windows(4, 16), 2)

#: what is measured: name -> class or module, and its function. Where one calls another, only its own time is its.
_PARTS: dict[str, tuple[Any, str]] = {
    "read": (StreamedDecoder, "layer"),
    "forward": (_Walk, "advance"),
    "hessian": (HessianAccumulator, "add"),
    "solve": (layerwise, "prune_linear_"),
    "write": (DurableWalkState, "_save_layer"),
}


def full_speed(size: Size, device: torch.device, folder: Path) -> dict[str, Any]:
    """Seconds by part (`all`: of the run at full speed), GiB copied each way and kept on the device at most."""
    write_checkpoint(folder / "model", size.shape, lambda share, message: None)
    if device.type == "cuda":
        _prune(size, device, folder, "warm-up")
        torch.cuda.reset_peak_memory_stats(device)
    copied: Counter[str] = Counter()
    with _counting(copied):
        took = _prune(size, device, folder, "fast")
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    parts: Counter[str] = Counter()
    with _timed(parts, device):
        waited = _prune(size, device, folder, "waited")
    shape = size.shape
    return {
        "protocol": f"random Llama: {shape.layers} layers, hidden {shape.hidden}, FFN {shape.intermediate}, float32; "
        f"{size.tokens} random tokens in batches of {size.batch_size}; SlimGPT at {_SPARSITY:.0%}, split equal",
        "seconds": {name: parts[name] for name in _PARTS} | {"all, each part waited for": waited, "all": took},
        "seconds_per_layer": round(took / shape.layers, 3),
        "overlap": round(1 - took / waited, 3),
        "gib_to_host": round(copied["to_host"] / 2**30, 3),
        "gib_to_device": round(copied["to_device"] / 2**30, 3),
        "peak_device_gib": peak if peak is None else round(peak, 2),
    }


def _prune(size: Size, device: torch.device, folder: Path, name: str) -> float:
    start = time.perf_counter()
    prune_checkpoint(
        folder / "model",
        folder / name,
        slimgpt,
        random_calibration(size.shape.vocab, size.tokens),
        slimgpt.Config(sparsity=_SPARSITY, split="equal"),
        options=WalkOptions(device, size.batch_size),
        work=folder / f"work-{name}",
    )
    _wait(device)
    return time.perf_counter() - start


@contextmanager
def _timed(parts: Counter[str], device: torch.device) -> Iterator[None]:
    """Add up the seconds of each part, the device being waited for before and after."""
    running: list[str] = []

    def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _wait(device)
            start = time.perf_counter()
            running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                _wait(device)
                took = time.perf_counter() - start
                running.pop()
                parts[name] += took
                if running:
                    parts[running[-1]] -= took

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in _PARTS.items():
            stack.enter_context(patch.object(owner, attribute, measured(name, getattr(owner, attribute))))
        yield


@contextmanager
def _counting(copied: Counter[str]) -> Iterator[None]:
    """Add up the bytes of activations that are copied."""
    to_host, to_device = Copies.to_host, Copies.to_device

    def leaving(self: Copies, values: Any, pieces: Any) -> Any:
        copied["to_host"] += sum(map(len, pieces))
        return to_host(self, values, pieces)

    def arriving(self: Copies, held: Any, *more: Any) -> Any:
        copied["to_device"] += sum(map(len, held.pieces))
        return to_device(self, held, *more)

    with patch.object(Copies, "to_host", leaving), patch.object(Copies, "to_device", arriving):
        yield


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
