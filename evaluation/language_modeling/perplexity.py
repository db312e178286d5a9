"""Perplexity of a causal language model over windows of texts, per token, word and byte.

Shapes: L tokens of a window, K of them predicted, B windows of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evaluation.errors import EvaluationError
from evaluation.inference.batches import rows_per_batch, run_batches
from evaluation.inference.eval_mode import eval_mode
from evaluation.inference.logits import logits_of, rows_per_forward, vocab_size
from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.protocol import Normalisation, WindowProtocol, check_length
from evaluation.language_modeling.windows import Window, select_windows, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FLOAT32_BYTES = 2**27
"""Cap on the float32 copy of a slice of them (128 MiB)."""


@dataclass(frozen=True)
class Scored:
    """A window and the sum over its targets of -log p(target | what is before it in the window), in nats."""

    window: Window
    nll: float


@dataclass(frozen=True)
class Figure:
    """Something computed from all windows, such as "word_ppl", and its standard error."""

    name: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Perplexity:
    """`ppl` = exp(`nll`), `nll` the mean negative log-likelihood in nats over `num_tokens` predicted tokens.

    normalised: word_ppl, byte_ppl and bits_per_byte, if the protocol asks for them, over `num_words` and `num_bytes`
    (see `windows.Normalisation`). A standard error takes windows as the unit, as if they were drawn independently of
    one another: neighbours in a document, and still more overlapping ones, are alike, so it rather is too small. It is
    None for a single window. `ppl` is inf if it is beyond a float.
    """

    ppl: float
    nll: float
    stderr: float | None
    num_windows: int
    num_tokens: int
    num_words: float = 0.0
    num_bytes: float = 0.0
    normalised: tuple[Figure, ...] = ()


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
    return summary(score_windows(model, tokenizer, texts, protocol, options), protocol)


def score_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    protocol: WindowProtocol,
    options: EvalOptions = EvalOptions(),
) -> list[Scored]:
    """The windows that `perplexity` measures, in their order. Raises what it raises."""
    check_length(protocol.window, longest_context(model))
    windows = select_windows(windows_of(tokenizer, texts, protocol), protocol)
    batches = _batches(model, windows, options)
    results = run_batches(
        model,
        window_nlls,
        [[windows[index] for index in batch] for batch in batches],
        options,
        told=lambda done: f"{done} of {len(windows)} windows of {protocol.window} tokens",
    )
    found = dict(zip(chain.from_iterable(batches), chain.from_iterable(results), strict=True))
    return [Scored(window, found[index]) for index, window in enumerate(windows)]


def longest_context(model: PreTrainedModel) -> int | None:
    """The model's max_position_embeddings in tokens; None if it states none."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


@torch.inference_mode()
def window_nlls(model: PreTrainedModel, windows: Sequence[Window]) -> list[float]:
    """Of each window, the sum over its targets of -log p(target | what is before it in the window), in nats.

    Logits are upcast to float32 in slices, so a large vocabulary does not cost a full float32 copy, and those of a long
    window are never all there (see `evaluation.inference.logits`). The sum is taken in float64. Shorter windows
    are filled up at the right, which no causal model sees. Raises EvaluationError for NaN.
    """
    inputs_BL = _filled(windows).to(model.device)
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
    nll, error = _ratio(sums, tokens)
    ppl = _exponential("ppl", nll, error)
    words = [entry.window.num_words for entry in scored]
    num_bytes = [entry.window.num_bytes for entry in scored]
    return Perplexity(
        ppl=ppl.value,
        nll=nll,
        stderr=ppl.stderr,
        num_windows=len(scored),
        num_tokens=int(sum(tokens)),
        num_words=math.fsum(words),
        num_bytes=math.fsum(num_bytes),
        normalised=_normalised(protocol.normalise, sums, words, num_bytes),
    )


def _batches(model: PreTrainedModel, windows: Sequence[Window], options: EvalOptions) -> list[list[int]]:
    """Indices of the windows, longest first; windows of one length keep their order and are never filled up."""
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].inputs))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        length = len(windows[order[start]].inputs)
        wanted = rows_per_batch(model, length, options)
        rows = rows_per_forward(vocab_size(model), length, model.dtype.itemsize, wanted)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def _filled(windows: Sequence[Window]) -> Tensor:
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


def _normalised(
    wanted: Sequence[Normalisation], sums: Sequence[float], words: Sequence[float], num_bytes: Sequence[float]
) -> tuple[Figure, ...]:
    found: list[Figure] = []
    if {"word", "lm_eval_word"} & set(wanted):
        found.append(_exponential("word_ppl", *_ratio(sums, words)))
    if "byte" in wanted:
        nll, error = _ratio(sums, num_bytes)
        found.append(_exponential("byte_ppl", nll, error))
        in_bits = None if error is None else error / math.log(2)
        found.append(Figure("bits_per_byte", nll / math.log(2), in_bits))
    return tuple(found)


def _ratio(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """sum(sums) / sum(weights), and its standard error over windows by the delta method (None for one window).

    inf where there is nothing to divide by: a figure per word of windows in which no word begins.
    """
    total, count = math.fsum(weights), len(sums)
    if total == 0:
        return math.inf, None
    mean = math.fsum(sums) / total
    if count < 2 or not math.isfinite(mean):
        return mean, None
    squares = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    return mean, math.sqrt(count / (count - 1) * squares) / total


def _exponential(name: str, mean: float, error: float | None) -> Figure:
    """exp of a mean; d exp(x) = exp(x) dx."""
    if mean >= 709:
        return Figure(name, math.inf, None)
    value = math.exp(mean)
    return Figure(name, value, None if error is None else value * error)
