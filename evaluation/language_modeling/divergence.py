"""How far a model's predictions are from those of a reference model, token by token, over the whole vocabulary.

A far more sensitive measure of damage than accuracy or perplexity, where what is lost here is gained there (arXiv
2407.09141, "Accuracy is Not All You Need"). Both models are run on the same windows at once and only numbers per token
are kept, so both must be in memory; they may be on different devices, or spread over several.

Shapes: L tokens of a window, K of them predicted, B windows of a batch, S tokens of a slice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.errors import EvaluationError
from evaluation.inference.batches import run_batches
from evaluation.inference.eval_mode import eval_mode
from evaluation.inference.logits import logits_of, vocab_size
from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import batches_of, exponential, padded, ratio_of_sums, slices_of
from evaluation.language_modeling.windows import Window
from evaluation.significance.verdicts import Figure

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
        """K, of tokens that are predicted."""
        return len(self.kl_K)


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

    Replicas are copies of one model only, so they are not used. Raises EvaluationError if the vocabularies differ or a
    model gives NaN.
    """
    check_comparable(model, reference)
    batches = batches_of(windows, [model, reference], options)
    message = f"{{}} of {len(windows)} windows"
    work = partial(_compare, reference)
    return run_batches(model, work, windows, batches, replace(options, replicas=None), message=message)


def divergence(windows: Sequence[Agreement]) -> Figure:
    """Mean KL divergence per token, in nats."""
    return _per_token_mean(windows, [each.kl_K for each in windows])


def divergence_quantile(windows: Sequence[Agreement], share: float) -> Figure:
    """The KL divergence that so large a share of the tokens does not exceed; without a standard error."""
    return Figure(float(np.quantile(np.concatenate([each.kl_K for each in windows]), share)), None)


def top1_agreement(windows: Sequence[Agreement]) -> Figure:
    """Share of tokens at which both models have the same likeliest next token."""
    return replace(_per_token_mean(windows, [each.same_K for each in windows]), higher_is_better=True)


def perplexity_ratio(windows: Sequence[Agreement]) -> Figure:
    """Perplexity of the model over that of the reference on the same tokens; its error is that of the paired
    difference."""
    return exponential(_per_token_mean(windows, [each.lost_K for each in windows]))


def _per_token_mean(windows: Sequence[Agreement], values: Sequence[NDArray[Any]]) -> Figure:
    sums = [float(each_K.sum(dtype=np.float64)) for each_K in values]
    return ratio_of_sums(sums, [float(each.num_tokens) for each in windows])


@torch.inference_mode()
def _compare(reference: PreTrainedModel, model: PreTrainedModel, windows: Sequence[Window]) -> list[Agreement]:
    """Work for `batches.run_batches`."""
    ids_BL = padded(windows)
    first = min(window.first for window in windows)
    with eval_mode(model, reference):
        mine, theirs = (logits_of(each, ids_BL.to(each.device), first) for each in (model, reference))
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
