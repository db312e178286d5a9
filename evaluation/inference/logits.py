"""Next-token logits of a batch, as many at once as memory should hold.

Shapes: B rows, L tokens, K positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGITS_BYTES = 2**29
"""Cap on the logits of one forward pass (512 MiB): 2048 tokens of a 128k vocabulary in bfloat16 just fit."""

Positions = Callable[[int, int, int], Tensor]
"""Of a row the logits [K, V] at positions begin to end of its tokens."""


def logits_of(model: PreTrainedModel, ids_BL: Tensor, start: int) -> Positions:
    """One forward pass; nothing before position `start` can be asked for.

    Logits that are larger than the cap are never all there: the head is applied to the hidden states of what is asked
    for, each time. A model whose logits are not simply its head's has them all.
    """
    kept = ids_BL.shape[1] - start
    size = ids_BL.shape[0] * kept * vocab_size(model) * model.dtype.itemsize
    if size > _LOGITS_BYTES and _is_plain(model, ids_BL[:1, :2]):
        hidden_BLD: Tensor = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        return lambda row, begin, end: head(hidden_BLD[row, begin:end])
    logits_BKV = last_logits(model, kept, input_ids=ids_BL, use_cache=False)
    return lambda row, begin, end: logits_BKV[row, begin - start : end - start]


def vocab_size(model: PreTrainedModel) -> int:
    """V, the width of the logits."""
    return int(model.config.get_text_config().vocab_size)


def rows_per_forward(vocab: int, length: int, itemsize: int, batch_size: int) -> int:
    """How many rows to run at once: `batch_size`, or fewer where their logits would not fit the cap; at least 1."""
    return max(1, min(batch_size, _LOGITS_BYTES // (vocab * length * itemsize)))


def last_logits(model: PreTrainedModel, kept: int, **given: Any) -> Tensor:
    """Logits [B, kept, V] of the last positions of a forward pass. The model's own forward cuts before its head, and so
    scales and caps the logits as its architecture does (Gemma 2, Granite, Cohere); one that cannot computes them all.
    """
    if keeps_logits(type(model).forward):
        # a number of last positions, not their indices: those could be on another device than the last layer
        logits_BKV: Tensor = model(**given, logits_to_keep=kept).logits
        return logits_BKV
    logits_BLV: Tensor = model(**given).logits
    return logits_BLV[:, -kept:]


@lru_cache(maxsize=32)
def keeps_logits(forward: Callable[..., object]) -> bool:
    """Whether a model's forward takes logits_to_keep."""
    return "logits_to_keep" in inspect.signature(forward).parameters


def _is_plain(model: PreTrainedModel, ids_1L: Tensor) -> bool:
    """Whether the logits are what the head makes of the last hidden states; seen on a few tokens."""
    head = model.get_output_embeddings()
    hidden = getattr(model.base_model(input_ids=ids_1L, use_cache=False), "last_hidden_state", None)
    if head is None or hidden is None:
        return False
    logits_1LV = model(input_ids=ids_1L, use_cache=False).logits
    return torch.allclose(head(hidden).to(logits_1LV.device), logits_1LV, rtol=1e-3, atol=1e-3, equal_nan=True)
