"""How far a model's predictions are from those of a reference model, token by token, over the whole vocabulary.

A far more sensitive measure of damage than accuracy or perplexity, where what is lost here is gained there (arXiv
2407.09141, "Accuracy is Not All You Need"). Both models are run on the same windows at once and only numbers per token
are kept, so both must be in memory; they may be on different devices, or spread over several.

Shapes: L tokens of a window, K of them predicted, B windows of a batch, S tokens of a slice, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.errors import EvaluationError
from evaluation.inference.batches import rows_per_batch, run_batches
from evaluation.inference.eval_mode import eval_mode
from evaluation.inference.logits import logits_of, rows_per_forward, vocab_size
from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import slices_of
from evaluation.language_modeling.windows import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT32_BYTES = 2**26
"""Cap on each of the five float32 copies of a slice of logits (64 MiB)."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """One window. kl_K: KL(reference || model) in nats. same_K: whether there is a token to which both give their
    greatest logit (in half precision several often share it). lost_K: log p_reference - log p_model of the token that
    follows, in nats."""

    window: Window
    kl_K: NDArray[np.float32]
    same_K: NDArray[np.bool_]
    lost_K: NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """K."""
        return len(self.kl_K)


@dataclass(frozen=True)
class Figure:
    """stderr is None where there is none: of a single window, of a quantile."""

    value: float
    stderr: float | None


def check_comparable(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Raise EvaluationError if the models do not predict the same tokens."""
    mine, theirs = vocab_size(model), vocab_size(reference)
    if mine != theirs:
        raise EvaluationError(
            f"the model has a vocabulary of {mine} tokens and its reference one of {theirs}, so their predictions "
            "cannot be compared; compare a model with the one that it was made from"
        )


def agreements(
    model: PreTrainedModel, reference: PreTrainedModel, windows: Sequence[Window], options: EvalOptions
) -> list[Agreement]:
    """Both models on every window, in order, each on the device and in the dtype it has; probabilities in float32.

    A crew has copies of one model only, so it is not used. Raises EvaluationError if the vocabularies differ or a model
    gives NaN.
    """
    check_comparable(model, reference)
    batches = _batches(model, reference, windows, options)
    results = run_batches(
        model,
        partial(_compare, reference),
        [[windows[index] for index in batch] for batch in batches],
        replace(options, replicas=None),
        told=lambda done: f"{done} of {len(windows)} windows",
    )
    found = dict(zip(chain.from_iterable(batches), chain.from_iterable(results), strict=True))
    return [found[index] for index in range(len(windows))]


def divergence(found: Sequence[Agreement]) -> Figure:
    """Mean KL divergence per token, in nats."""
    return _mean([_sum(each.kl_K) for each in found], found)


def divergence_quantile(found: Sequence[Agreement], share: float) -> Figure:
    """The KL divergence that so large a share of the tokens does not exceed."""
    return Figure(float(np.quantile(np.concatenate([each.kl_K for each in found]), share)), None)


def top1_agreement(found: Sequence[Agreement]) -> Figure:
    """Share of tokens at which both models have the same likeliest next token."""
    return _mean([float(each.same_K.sum()) for each in found], found)


def perplexity_ratio(found: Sequence[Agreement]) -> Figure:
    """Perplexity of the model over that of the reference on the same tokens; its error is that of the paired
    difference, by the delta method."""
    log = _mean([_sum(each.lost_K) for each in found], found)
    if log.value >= 709:
        return Figure(math.inf, None)
    ratio = math.exp(log.value)
    return Figure(ratio, None if log.stderr is None else ratio * log.stderr)


@torch.inference_mode()
def _compare(reference: PreTrainedModel, model: PreTrainedModel, windows: Sequence[Window]) -> list[Agreement]:
    """Shorter windows are filled up at the right, which no causal model sees."""
    ids_BL = np.zeros((len(windows), max(len(window.inputs) for window in windows)), dtype=np.int64)
    for row, window in enumerate(windows):
        ids_BL[row, : len(window.inputs)] = window.inputs
    first = min(window.first for window in windows)
    with eval_mode(model, reference):
        mine, theirs = (logits_of(each, torch.from_numpy(ids_BL).to(each.device), first) for each in (model, reference))
        return [
            _agreement(window, partial(mine, row), partial(theirs, row), vocab_size(model))
            for row, window in enumerate(windows)
        ]


def _agreement(
    window: Window, mine: Callable[[int, int], Tensor], theirs: Callable[[int, int], Tensor], vocab: int
) -> Agreement:
    parts = []
    for begin, targets_S in slices_of(window, vocab, _FLOAT32_BYTES):
        mine_SV = mine(begin, begin + len(targets_S))
        theirs_SV = theirs(begin, begin + len(targets_S)).to(mine_SV.device)
        parts.append(_per_token(mine_SV, theirs_SV, targets_S.to(mine_SV.device)))
    kl_K, same_K, lost_K = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    if np.isnan(kl_K).any():
        raise EvaluationError(
            "the model or its reference gives NaN: its weights are broken or its dtype overflows; evaluate in float32 "
            "or prune less"
        )
    return Agreement(window, kl_K, same_K, lost_K)


def _per_token(mine_SV: Tensor, theirs_SV: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_q_SV = torch.log_softmax(mine_SV.float(), dim=-1)
    log_p_SV = torch.log_softmax(theirs_SV.float(), dim=-1)
    gap_SV = log_p_SV - log_q_SV
    lost_S = gap_SV.gather(1, targets_S[:, None])[:, 0]
    same_S = (_greatest(mine_SV) & _greatest(theirs_SV)).any(-1)
    return (log_p_SV.exp_() * gap_SV).sum(-1), same_S, lost_S


def _greatest(logits_SV: Tensor) -> Tensor:
    return logits_SV == logits_SV.amax(-1, keepdim=True)


def _batches(
    model: PreTrainedModel, reference: PreTrainedModel, windows: Sequence[Window], options: EvalOptions
) -> list[list[int]]:
    """Indices of the windows, longest first; the logits of both models count."""
    itemsize = model.dtype.itemsize + reference.dtype.itemsize
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].inputs))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        length = len(windows[order[start]].inputs)
        rows = rows_per_forward(vocab_size(model), length, itemsize, rows_per_batch(model, length, options))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def _sum(values: NDArray[np.float32]) -> float:
    return float(values.sum(dtype=np.float64))


def _mean(sums: Sequence[float], found: Sequence[Agreement]) -> Figure:
    """Mean over all tokens; the standard error of that ratio of sums over windows, as if they were independent."""
    tokens = [each.num_tokens for each in found]
    total, count = sum(tokens), len(found)
    mean = math.fsum(sums) / total
    if count < 2:
        return Figure(mean, None)
    squares = math.fsum((part - mean * size) ** 2 for part, size in zip(sums, tokens, strict=True))
    return Figure(mean, math.sqrt(count / (count - 1) * squares) / total)
