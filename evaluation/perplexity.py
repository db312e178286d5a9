"""Perplexity of a causal language model over non-overlapping windows of joined texts.

Shapes: N windows, L tokens of a window, B windows of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evaluation.errors import EvaluationError
from evaluation.eval_mode import eval_mode
from evaluation.suite import Progress, silent
from evaluation.windows import WindowProtocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS_BYTES = 2**29
"""Cap on the logits of one forward pass (512 MiB): 2048 tokens of a 128k vocabulary in bfloat16 just fit."""

_FLOAT32_BYTES = 2**27
"""Cap on the float32 copy of a slice of them (128 MiB)."""


@dataclass(frozen=True)
class Perplexity:
    """`ppl` = exp(`nll`), `nll` the mean negative log-likelihood in nats over `num_tokens` predicted tokens.

    `stderr` belongs to `ppl`; it takes windows as the unit and is None for a single window. `ppl` is inf if it is
    beyond a float.
    """

    ppl: float
    nll: float
    stderr: float | None
    num_windows: int
    num_tokens: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    protocol: WindowProtocol,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Perplexity:
    """Measure `model` on `texts`, on the device and in the dtype it has; log-likelihoods are summed in float64.

    Raises EvaluationError if the texts are too short, the window too long for the model, a BOS token is asked of a
    tokenizer without one, or the model gives NaN.
    """
    check_fits(model, protocol.window)
    windows = select_windows(windows_of(tokenizer, texts, protocol), protocol)
    rows = rows_per_forward(int(model.config.vocab_size), protocol.window, model.dtype.itemsize, batch_size)
    sums: list[float] = []
    for batch_BL in _batches(windows, rows):
        nll_B = window_nll(model, batch_BL)
        if bool(torch.isnan(nll_B).any()):
            raise EvaluationError(
                f"the model gives NaN on {len(batch_BL)} windows of {batch_BL.shape[1]} tokens: its weights are broken "
                f"or {model.dtype} overflows; evaluate in float32 or prune less"
            )
        sums.extend(nll_B.tolist())
        progress(len(sums) / len(windows), f"{len(sums)} of {len(windows)} windows of {protocol.window} tokens")
    return _summary(sums, [len(window) - 1 for window in windows])


def check_fits(model: PreTrainedModel, window: int) -> None:
    """Raise EvaluationError if the model has no positions for a window of so many tokens."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise EvaluationError(
            f"a window of {window} tokens is longer than the model's max_position_embeddings of {limit}; "
            f"ask for a window of at most {limit}"
        )


def windows_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], protocol: WindowProtocol) -> list[Tensor]:
    """All windows of the joined texts, each an int64 tensor (L,).

    Full windows, then the shorter rest if `keep_last_partial` asks for it or if it is all there is. A rest of one
    token predicts nothing and is left out. The tokenizer never adds BOS itself: some do by default and some do not,
    and the figure must not depend on it.
    """
    ids = tokenizer(protocol.join.join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    head = [] if protocol.bos == "none" else [_bos_id(tokenizer, protocol)]
    stream = torch.tensor(head + list(ids) if protocol.bos == "once" else list(ids), dtype=torch.long)
    per_window = torch.tensor(head if protocol.bos == "per_window" else [], dtype=torch.long)
    length = protocol.window - len(per_window)
    pieces = [torch.cat([per_window, piece]) for piece in torch.split(stream, length)] if len(stream) else []
    full = [piece for piece in pieces if len(piece) == protocol.window]
    rest = [piece for piece in pieces[len(full) :] if len(piece) >= 2]
    if not full and not rest:
        raise EvaluationError(
            f"the {len(texts)} texts hold {len(ids)} tokens with bos='{protocol.bos}', too few to predict one; "
            "give a longer text or another split"
        )
    return full + rest if protocol.keep_last_partial or not full else full


def select_windows(windows: list[Tensor], protocol: WindowProtocol) -> list[Tensor]:
    """The windows to measure: all of them, or the first `max_windows` of a seeded permutation."""
    if protocol.max_windows is None:
        return windows
    generator = torch.Generator().manual_seed(protocol.window_seed)
    order = torch.randperm(len(windows), generator=generator)[: protocol.max_windows]
    return [windows[index] for index in order.tolist()]


@torch.inference_mode()
def window_nll(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """Sum over each window of -log p(token | the tokens before it in the window): (B,) float64 on the CPU.

    The logits are upcast to float32 in slices, so a large vocabulary does not cost a full float32 copy.
    """
    ids_BL = ids_BL.to(model.device)
    with eval_mode(model):
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    rows_RV = logits_BLV[:, :-1].flatten(0, 1)
    targets_R = ids_BL[:, 1:].flatten()
    step = max(1, _FLOAT32_BYTES // (4 * rows_RV.shape[1]))
    nll_R = torch.cat(
        [
            cross_entropy(slice_SV.float(), targets_S, reduction="none")
            for slice_SV, targets_S in zip(torch.split(rows_RV, step), torch.split(targets_R, step), strict=True)
        ]
    )
    return nll_R.to("cpu", torch.float64).view(len(ids_BL), -1).sum(1)


def rows_per_forward(vocab_size: int, window: int, itemsize: int, batch_size: int) -> int:
    """How many windows to run at once: `batch_size`, or fewer where their logits would not fit the cap; at least 1."""
    return max(1, min(batch_size, _LOGITS_BYTES // (vocab_size * window * itemsize)))


def _batches(windows: list[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Batches (B, L) of equal length, in order, so that nothing is ever padded."""
    for _, group in groupby(windows, key=len):
        equal = list(group)
        for start in range(0, len(equal), batch_size):
            yield torch.stack(equal[start : start + batch_size])


def _summary(sums: list[float], tokens: list[int]) -> Perplexity:
    total = sum(tokens)
    nll = math.fsum(sums) / total
    ppl = math.exp(nll) if nll < 709 else math.inf
    return Perplexity(ppl, nll, _stderr(sums, tokens, nll, ppl), len(sums), total)


def _stderr(sums: list[float], tokens: list[int], nll: float, ppl: float) -> float | None:
    """Standard error of a ratio of sums over windows, carried through exp by the delta method: d ppl = ppl * d nll."""
    count = len(sums)
    if count < 2 or not math.isfinite(ppl):
        return None
    squares = math.fsum((s - nll * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    return ppl * math.sqrt(count / (count - 1) * squares) / sum(tokens)


def _bos_id(tokenizer: PreTrainedTokenizerBase, protocol: WindowProtocol) -> int:
    bos: Any = tokenizer.bos_token_id
    if bos is None:
        raise EvaluationError(
            f"bos='{protocol.bos}' is asked, but the tokenizer {type(tokenizer).__name__} has no BOS token; "
            "set bos: none"
        )
    return int(bos)
