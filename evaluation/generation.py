"""One run of the profile: a forward pass over a prompt, then greedy decoding with a KV cache, both timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from evaluation.errors import EvaluationError
from evaluation.profile_config import ProfileConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class TimedRun:
    """Milliseconds of the prompt's forward pass and of each decoded token, and the cache's size."""

    prefill_ms: float
    decode_ms_per_token: float
    kv_cache_bytes_per_token: int


def random_prompt(model: PreTrainedModel, config: ProfileConfig) -> Tensor:
    """Random token ids (batch_size, prompt_len) on the model's device.

    Raises EvaluationError if the model has too few positions for prompt and new tokens.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.prompt_len + config.new_tokens > limit:
        raise EvaluationError(
            f"prompt_len {config.prompt_len} + new_tokens {config.new_tokens} is more than the model's "
            f"max_position_embeddings of {limit}; shorten one of them"
        )
    generator = torch.Generator().manual_seed(config.seed)
    size = (config.batch_size, config.prompt_len)
    return torch.randint(0, int(model.config.vocab_size), size, generator=generator).to(model.device)


@torch.inference_mode()
def timed_run(model: PreTrainedModel, prompt_BL: Tensor, new_tokens: int) -> TimedRun:
    """Prefill, then `new_tokens` greedy steps. A loop of our own, because `generate` stops at an EOS token and times
    its own bookkeeping too."""
    prefill_ms, out = _timed(model, lambda: model(input_ids=prompt_BL, use_cache=True, logits_to_keep=1))
    bytes_per_token = _cache_bytes(out.past_key_values) // prompt_BL.numel()
    decode_ms, _ = _timed(model, lambda: _decode(model, out, new_tokens))
    return TimedRun(prefill_ms, decode_ms / new_tokens, bytes_per_token)


def _decode(model: PreTrainedModel, out: Any, new_tokens: int) -> None:
    for _ in range(new_tokens):
        token_B1 = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token_B1, past_key_values=out.past_key_values, use_cache=True)


def _timed(model: PreTrainedModel, work: Callable[[], T]) -> tuple[float, T]:
    _wait(model.device)
    start = time.perf_counter()
    result = work()
    _wait(model.device)
    return 1000 * (time.perf_counter() - start), result


def _wait(device: torch.device) -> None:
    """CUDA returns before its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_bytes(cache: Any) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
