"""Log-likelihoods of given answers after given contexts: what lm-eval's `loglikelihood` requests ask for.

Requests that feed a model the same tokens share one row (the A, B, C and D of a question, "yes" and "no"), rows that
begin with the same examples run these once, the longest rows come first, and the head is applied to the positions that
an answer depends on. The figures are those of lm-eval's own path to the rounding of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.errors import EvaluationError
from evaluation.inference.batches import batched, rows_per_batch, run_batches
from evaluation.inference.logits import last_logits
from evaluation.inference.options import EvalOptions
from evaluation.inference.shared_prefix import cost, grouped, run_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of an answer."""

_ELEMENTS_AT_ONCE = 2**24
"""Logits that are normalised at once: 64 MiB in float32, however long the answers and large the vocabulary."""


@dataclass(frozen=True)
class Row:
    """Tokens to run, and the answers read from them: of an answer of n tokens the last n positions predict it.

    shared: so many first tokens are those of every row of the batch.
    """

    input_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    shared: int = 0

    @property
    def first(self) -> int:
        """The first position whose prediction is needed."""
        return len(self.input_ids) - max(map(len, self.answers))


@dataclass(frozen=True)
class Score:
    """log_likelihood: in nats, summed over the answer's tokens. is_greedy: every token was the likeliest."""

    log_likelihood: float
    is_greedy: bool


def score_answers(
    model: PreTrainedModel, pairs: Sequence[Pair], options: EvalOptions, *, max_length: int
) -> list[Score]:
    """The score of each answer after its context.

    A pair of more than max_length + 1 tokens loses the first tokens of its context, as in lm-eval.
    Raises EvaluationError for an answer without tokens or of more than max_length, and for one without a context.
    """
    gathered, places = gather_rows(pairs, max_length)
    rows, batches = _share_prefixes(gathered, partial(rows_per_batch, model, options=options))
    message = f"{{}} of {len(rows)} prompts scored"
    scores = run_batches(model, score_rows, rows, batches, options, message=message)
    return [scores[row][answer] for row, answer in places]


def _share_prefixes(rows: Sequence[Row], rows_at_once: Callable[[int], int]) -> tuple[list[Row], list[list[int]]]:
    """The rows with how many first tokens each shares with its group, and the batches of all groups, the longest first:
    memory that runs short does so at once."""
    sharing, batches = [*rows], list[list[int]]()
    for group in grouped([row.input_ids for row in rows], [row.first for row in rows], rows_at_once):
        for index in group.rows:
            sharing[index] = replace(rows[index], shared=group.shared)
        batches += batched({i: cost(len(rows[i].input_ids), group.shared) for i in group.rows}, rows_at_once)
    return sharing, sorted(batches, key=lambda batch: -max(len(rows[index].input_ids) for index in batch))


def gather_rows(pairs: Sequence[Pair], max_length: int) -> tuple[list[Row], list[tuple[int, int]]]:
    """The rows that answer all pairs, and where each pair is answered: (row, answer). See `score_answers`."""
    answers: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    numbers: dict[tuple[int, ...], int] = {}
    places = []
    for context, answer in pairs:
        if not 0 < len(answer) <= max_length:
            raise EvaluationError(
                f"an answer has {len(answer)} tokens, and this model can score 1 to {max_length}; leave the task out"
            )
        if not context:
            raise EvaluationError(
                "an answer has no token before it that could predict it: a prompt is empty and the tokenizer adds no "
                "beginning-of-sequence token; leave the task out"
            )
        input_ids = (*context, *answer)[-(max_length + 1) :][:-1]
        asked = answers.setdefault(input_ids, {})
        places.append((numbers.setdefault(input_ids, len(numbers)), asked.setdefault(tuple(answer), len(asked))))
    return [Row(input_ids, tuple(asked)) for input_ids, asked in answers.items()], places


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: Sequence[Row]) -> list[tuple[Score, ...]]:
    """Per row the scores of its answers, from one forward pass: work for `batches.run_batches`.

    The rows are padded on the right and not masked, for a causal model sees nothing of what follows.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids_BL = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in rows])
    start = min(row.first for row in rows)
    logits_BKV = _logits(model, ids_BL.to(model.device), start, rows[0].shared)
    asked = [(number, row, answer) for number, row in enumerate(rows) for answer in row.answers]
    # one entry per token of an answer: where it is predicted, and what it is
    row_M = [number for number, _, answer in asked for _ in answer]
    place_M = [len(row.input_ids) - len(answer) + n - start for _, row, answer in asked for n in range(len(answer))]
    token_M = [token for _, _, answer in asked for token in answer]
    where_M3 = torch.tensor([row_M, place_M, token_M], device=logits_BKV.device).T
    chunks = torch.split(where_M3, max(1, _ELEMENTS_AT_ONCE // logits_BKV.shape[-1]))
    parts = [_at_tokens(logits_BKV, *chunk_M3.T) for chunk_M3 in chunks]
    lengths = [len(answer) for _, _, answer in asked]
    values = torch.split(torch.cat([value_M for value_M, _ in parts]).cpu(), lengths)
    greedy = torch.split(torch.cat([greedy_M for _, greedy_M in parts]).cpu(), lengths)
    scores = iter([Score(float(v.sum()), bool(g.all())) for v, g in zip(values, greedy, strict=True)])
    return [tuple(next(scores) for _ in row.answers) for row in rows]


def _at_tokens(logits_BKV: Tensor, row_M: Tensor, place_M: Tensor, token_M: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, in the logits' own dtype as in lm-eval, and whether it is the likeliest."""
    log_probs_MV = torch.log_softmax(logits_BKV[row_M, place_M], dim=-1)
    return log_probs_MV.gather(1, token_M[:, None])[:, 0], log_probs_MV.argmax(dim=-1) == token_M


def _logits(model: PreTrainedModel, ids_BL: Tensor, start: int, shared: int) -> Tensor:
    """Logits of the positions from `start` on; the first `shared` tokens, the same in all rows, are run for one."""
    past = run_prefix(model, ids_BL[0, :shared]) if shared else None
    kept = ids_BL.shape[1] - start
    if past is None:
        return last_logits(model, kept, input_ids=ids_BL, use_cache=False)
    return last_logits(model, kept, input_ids=ids_BL[:, shared:], past_key_values=past, use_cache=True)
