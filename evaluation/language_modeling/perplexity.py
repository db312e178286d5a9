"""Perplexity of a causal language model over windows of texts, per token, word and byte.

Shapes: L tokens of a window, K of them predicted, B windows of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evaluation.errors import EvaluationError
from evaluation.inference.batches import batched, rows_per_batch, run_batches
from evaluation.inference.eval_mode import eval_mode
from evaluation.inference.logits import logits_of, rows_per_forward, vocab_size
from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.protocol import WindowProtocol, check_length
from evaluation.language_modeling.windows import Window, select_windows, windows_of
from evaluation.significance.verdicts import Figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FLOAT32_BYTES = 2**27
"""Cap on the float32 copy of a slice of logits (128 MiB)."""


@dataclass(frozen=True)
class Scored:
    """A window and the sum over its targets of -log p(target | what is before it in the window), in nats."""

    window: Window
    nll: float


@dataclass(frozen=True)
class Perplexity:
    """`ppl` = exp(`nll`), `nll` the mean negative log-likelihood in nats over `num_tokens` predicted tokens.

    normalised: word_ppl, byte_ppl and bits_per_byte, if the protocol asks for them, over `num_words` and `num_bytes`
    (see `protocol.Normalisation`). A standard error takes windows as the unit, as if they were drawn independently of
    one another: neighbours in a document, and still more overlapping ones, are alike, so it rather is too small. It is
    None for a single window. `ppl` is inf if it is beyond a float. scored: the windows, in their order.
    """

    ppl: float
    nll: float
    stderr: float | None
    scored: Sequence[Scored]
    num_tokens: int
    num_words: float = 0.0
    num_bytes: float = 0.0
    normalised: Mapping[str, Figure] = field(default_factory=dict)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    protocol: WindowProtocol,
    options: EvalOptions = EvalOptions(),
) -> Perplexity:
    """Measure `model` on `texts`, on the device and in the dtype it has; log-likelihoods are summed in float64.

    Raises EvaluationError if the texts are too short, the window too long for the model, the protocol contradicts
    itself, a token is asked of a tokenizer without one, or the model gives NaN.
    """
    check_length(protocol.window, longest_context(model))
    windows = select_windows(windows_of(tokenizer, texts, protocol), protocol)
    message = f"{{}} of {len(windows)} windows of {protocol.window} tokens"
    batches = batches_of(windows, [model], options)
    sums = run_batches(model, window_nlls, windows, batches, options, message=message)
    return summary([Scored(window, nll) for window, nll in zip(windows, sums, strict=True)], protocol)


def longest_context(model: PreTrainedModel) -> int | None:
    """The model's max_position_embeddings in tokens; None if it states none."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


@torch.inference_mode()
def window_nlls(model: PreTrainedModel, windows: Sequence[Window]) -> list[float]:
    """Of each window, the sum over its targets of -log p(target | what is before it in the window), in nats.

    Logits are upcast to float32 in slices, so a large vocabulary does not cost a full float32 copy, and those of a long
    window are never all there (see `evaluation.inference.logits`). The sum is taken in float64. Raises EvaluationError
    for NaN.
    """
    inputs_BL = padded(windows).to(model.device)
    with eval_mode(model):
        logits = logits_of(model, inputs_BL, min(window.first for window in windows))
        sums = [_nll(partial(logits, row), window, vocab_size(model)) for row, window in enumerate(windows)]
    if any(map(math.isnan, sums)):
        raise EvaluationError(
            f"the model gives NaN on {len(windows)} windows of {inputs_BL.shape[1]} tokens: its weights are broken "
            f"or {model.dtype} overflows; evaluate in float32 or prune less"
        )
    return sums


def summary(scored: Sequence[Scored], protocol: WindowProtocol) -> Perplexity:
    """The figures over all windows: sums over sums, so that each token (word, byte) has the same weight."""
    sums = [entry.nll for entry in scored]
    tokens = [float(len(entry.window.targets)) for entry in scored]
    words = [entry.window.num_words for entry in scored]
    num_bytes = [entry.window.num_bytes for entry in scored]
    nll, per_byte = ratio_of_sums(sums, tokens), ratio_of_sums(sums, num_bytes)
    normalised: dict[str, Figure] = {}
    if {"word", "lm_eval_word"} & set(protocol.normalise):
        normalised["word_ppl"] = exponential(ratio_of_sums(sums, words))
    if "byte" in protocol.normalise:
        error_in_bits = None if per_byte.stderr is None else per_byte.stderr / math.log(2)
        normalised |= {
            "byte_ppl": exponential(per_byte),
            "bits_per_byte": Figure(per_byte.value / math.log(2), error_in_bits),
        }
    return Perplexity(
        ppl=exponential(nll).value,
        nll=nll.value,
        stderr=exponential(nll).stderr,
        scored=scored,
        num_tokens=int(sum(tokens)),
        num_words=math.fsum(words),
        num_bytes=math.fsum(num_bytes),
        normalised=normalised,
    )


def batches_of(windows: Sequence[Window], models: Sequence[PreTrainedModel], options: EvalOptions) -> list[list[int]]:
    """Windows (by their place) in batches, the longest first; the logits of all the models must fit at once."""
    vocab, itemsize = vocab_size(models[0]), sum(model.dtype.itemsize for model in models)

    def rows_at_once(length: int) -> int:
        return rows_per_forward(vocab, length, itemsize, rows_per_batch(models[0], length, options))

    return batched({place: len(window.inputs) for place, window in enumerate(windows)}, rows_at_once)


def padded(windows: Sequence[Window]) -> Tensor:
    """The inputs of a batch (B, L); shorter windows are filled up at the right, which no causal model sees."""
    ids_BL = np.zeros((len(windows), max(len(window.inputs) for window in windows)), dtype=np.int64)
    for row, window in enumerate(windows):
        ids_BL[row, : len(window.inputs)] = window.inputs
    return torch.from_numpy(ids_BL)


def _nll(logits: Callable[[int, int], Tensor], window: Window, vocab_size: int) -> float:
    parts = []
    for begin, targets_S in slices_of(window, vocab_size, _FLOAT32_BYTES):
        logits_SV = logits(begin, begin + len(targets_S)).float()
        parts.append(cross_entropy(logits_SV, targets_S.to(logits_SV.device), reduction="none"))
    return float(torch.cat(parts).to("cpu", torch.float64).sum())


def slices_of(window: Window, vocab_size: int, float32_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Where in a window the targets' predictions begin, and the targets, in slices whose logits take so many bytes."""
    step = max(1, float32_bytes // (4 * vocab_size))
    targets_K = torch.from_numpy(window.targets.copy())
    for offset in range(0, len(targets_K), step):
        yield window.first + offset, targets_K[offset : offset + step]


def ratio_of_sums(sums: Sequence[float], weights: Sequence[float]) -> Figure:
    """sum(sums) / sum(weights), and its standard error over windows by the delta method (None for one window).

    inf where there is nothing to divide by: a figure per word of windows in which no word begins.
    """
    total, count = math.fsum(weights), len(sums)
    if total == 0:
        return Figure(math.inf, None)
    mean = math.fsum(sums) / total
    if count < 2 or not math.isfinite(mean):
        return Figure(mean, None)
    squares = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    return Figure(mean, math.sqrt(count / (count - 1) * squares) / total)


def exponential(mean: Figure) -> Figure:
    """exp of a figure, its standard error by the delta method: d exp(x) = exp(x) dx."""
    if mean.value >= 709:
        return Figure(math.inf, None)
    value = math.exp(mean.value)
    return Figure(value, None if mean.stderr is None else value * mean.stderr)
