"""A generation that can be timed: a forward pass over a prompt, then greedy decoding with a KV cache.

A loop of our own, because `generate` stops at an EOS token and times its own bookkeeping too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.profile.config import GridPoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Clock = Callable[[], float]
"""Seconds, from any origin."""


@dataclass(frozen=True)
class Runner:
    """A model and how it is called: itself, or its compiled forward pass."""

    model: PreTrainedModel
    forward: Callable[..., Any]

    @property
    def device(self) -> torch.device:
        """Where its input goes: of a spread model the first device."""
        device: torch.device = self.model.device
        return device


@dataclass(frozen=True)
class TimedRun:
    """Milliseconds of one generation, each from its start: to the end of the prompt's forward pass, to the first token,
    to the last one."""

    prefill_ms: float
    ttft_ms: float
    latency_ms: float
    new_tokens: int

    @property
    def decode_ms_per_token(self) -> float | None:
        """Mean over the tokens after the first; None if there are none."""
        if self.new_tokens == 1:
            return None
        return (self.latency_ms - self.ttft_ms) / (self.new_tokens - 1)


class Generation:
    """One generation in progress, in parts of which each has ended on the device when its call returns."""

    def __init__(self, runner: Runner, prompt_BL: Tensor) -> None:
        self._runner = runner
        self._prompt_BL = prompt_BL
        self._out: Any = None
        self._token_B1: Tensor | None = None

    @torch.inference_mode()
    def prefill(self) -> None:
        """The forward pass over the prompt."""
        self._out = self._runner.forward(input_ids=self._prompt_BL, use_cache=True, logits_to_keep=1)
        self._wait()

    @torch.inference_mode()
    def choose(self) -> None:
        """The first token, the likeliest after the prompt."""
        self._token_B1 = self._out.logits[:, -1:].argmax(-1)
        self._wait()

    @torch.inference_mode()
    def decode(self, tokens: int) -> None:
        """So many further tokens; the device is waited for once, after all of them."""
        for _ in range(tokens):
            cache = self._out.past_key_values
            self._out = self._runner.forward(input_ids=self._token_B1, past_key_values=cache, use_cache=True)
            self._token_B1 = self._out.logits[:, -1:].argmax(-1)
        self._wait()

    def _wait(self) -> None:
        """An accelerator returns before its work is done."""
        wait_for(self._runner.device)


def wait_for(device: torch.device) -> None:
    """Until all that was queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()  # a compiled model is compiled anew for a tensor made outside
def random_prompt(model: PreTrainedModel, point: GridPoint, seed: int) -> Tensor:
    """Random token ids (batch_size, prompt_len) on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    size = (point.batch_size, point.prompt_len)
    return torch.randint(0, int(model.config.vocab_size), size, generator=generator).to(model.device)


def timed_run(runner: Runner, prompt_BL: Tensor, new_tokens: int, *, clock: Clock = time.perf_counter) -> TimedRun:
    """One whole generation, with no other work in between."""
    generation = Generation(runner, prompt_BL)
    wait_for(runner.device)
    start = clock()
    generation.prefill()
    prefilled = clock()
    generation.choose()
    first = clock()
    generation.decode(new_tokens - 1)
    last = clock()
    return TimedRun(1000 * (prefilled - start), 1000 * (first - start), 1000 * (last - start), new_tokens)
