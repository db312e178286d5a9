"""Scores of given answers: those of lm-eval's own path on every family, and by hand on one row."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from evaluation.errors import EvaluationError
from evaluation.inference import logits
from evaluation.inference import loglikelihood as scoring
from evaluation.inference.loglikelihood import Pair, gather_rows, score_answers, score_rows
from evaluation.inference.options import EvalOptions
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from tests.tiny import FAMILIES, VOCAB_SIZE, random_plan, tiny_model

MAX_LENGTH = 512


def pairs_of(*, seed: int = 0, longest: int = 40) -> list[Pair]:
    """Questions with choices of several tokens, of one (as of MMLU), and one that is asked twice."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for number in range(9):
        context = [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(1, longest))]
        for _ in range(4):
            length = 1 if number % 3 == 0 else rng.randint(1, 6)
            pairs.append((context, [rng.randrange(2, VOCAB_SIZE) for _ in range(length)]))
    return [*pairs, pairs[3]]


def by_lm_eval(
    model: PreTrainedModel, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[float, bool]]:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    found: list[tuple[float, bool]] = lm._loglikelihood_tokens(
        [((str(n), ""), list(context), list(answer)) for n, (context, answer) in enumerate(pairs)], disable_tqdm=True
    )
    return found


def assert_equal_to_lm_eval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: EvalOptions) -> None:
    pairs = pairs_of()
    scores = score_answers(model, pairs, options, max_length=MAX_LENGTH)
    expected = by_lm_eval(model, pairs, tokenizer)
    assert [score.log_likelihood for score in scores] == pytest.approx([value for value, _ in expected], abs=2e-5)
    assert [score.is_greedy for score in scores] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_scores_are_those_of_lm_eval(tokenizer: PreTrainedTokenizerFast, batch_size: int | None) -> None:
    assert_equal_to_lm_eval(tiny_model("llama"), tokenizer, EvalOptions(batch_size=batch_size))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_lm_eval_dense_and_pruned(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(family)
    assert_equal_to_lm_eval(model, tokenizer, EvalOptions())
    shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=2))
    assert_equal_to_lm_eval(model, tokenizer, EvalOptions())


SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}


def test_logits_that_the_model_caps_or_scales(tokenizer: PreTrainedTokenizerFast) -> None:
    """Gemma 2 caps its logits, Granite divides them."""
    torch.manual_seed(0)
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=0.3, initializer_range=0.5)),
        GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, logits_scaling=8.0, initializer_range=0.5)),
    ):
        assert_equal_to_lm_eval(model.eval(), tokenizer, EvalOptions())


def test_a_model_that_cannot_leave_logits_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "keeps_logits", lambda forward: False)
    assert_equal_to_lm_eval(model, tokenizer, EvalOptions())


def test_answers_by_hand(model: PreTrainedModel) -> None:
    """The same tokens are cut into context and answer at two places; where lm-eval shares such a row, it reads the
    shorter answer at the longer one's first place, and no task of it does that."""
    ids, other = [5, 9, 11, 4, 8, 3, 77], 30
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    best = int(log_probs[5].argmax())
    pairs: list[Pair] = [(ids[:4], ids[4:]), (ids[:6], ids[6:]), (ids[:5], [ids[5], other]), (ids[:6], [best])]
    expected = [
        sum(float(log_probs[n - 1, ids[n]]) for n in (4, 5, 6)),
        float(log_probs[5, ids[6]]),
        float(log_probs[4, ids[5]] + log_probs[5, other]),
        float(log_probs[5, best]),
    ]
    assert len(gather_rows(pairs, MAX_LENGTH)[0]) == 1
    found = score_answers(model, pairs, EvalOptions(), max_length=MAX_LENGTH)
    assert [score.log_likelihood for score in found] == pytest.approx(expected, abs=1e-5)
    assert [score.is_greedy for score in found] == [False, False, False, True]


def test_requests_that_feed_the_same_tokens_share_a_row() -> None:
    pairs: list[Pair] = [([1, 2, 3], [token]) for token in (10, 11, 12, 13)]
    pairs += [([1, 2], [3, 10]), ([1, 2, 3], [10, 11]), ([9], [9])]
    rows, places = gather_rows(pairs, MAX_LENGTH)
    assert [row.input_ids for row in rows] == [(1, 2, 3), (1, 2, 3, 10), (9,)]
    assert rows[0].answers == ((10,), (11,), (12,), (13,), (3, 10))
    assert [row.first for row in rows] == [1, 2, 0]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (2, 0)]


def test_long_contexts_lose_their_beginning_as_in_lm_eval(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama", max_position_embeddings=24)
    pairs = pairs_of(longest=60)
    scores = score_answers(model, pairs, EvalOptions(), max_length=24)
    expected = [value for value, _ in by_lm_eval(model, pairs, tokenizer)]
    assert [score.log_likelihood for score in scores] == pytest.approx(expected, abs=2e-5)
    assert max(len(row.input_ids) for row in gather_rows(pairs, 24)[0]) == 24


@pytest.mark.parametrize("length", [0, 25])
def test_an_answer_that_cannot_be_scored_is_refused(model: PreTrainedModel, length: int) -> None:
    with pytest.raises(EvaluationError, match=f"an answer has {length} tokens, and this model can score 1 to 24"):
        score_answers(model, [([1], [2] * length)], EvalOptions(), max_length=24)


def test_an_answer_without_a_prompt_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(EvaluationError, match="no token before it"):
        score_answers(model, [([], [5, 6])], EvalOptions(), max_length=24)


def test_a_large_vocabulary_is_normalised_in_pieces(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = gather_rows(pairs_of(), MAX_LENGTH)
    whole = score_rows(model, rows)
    monkeypatch.setattr(scoring, "_ELEMENTS_AT_ONCE", 3 * VOCAB_SIZE)
    assert score_rows(model, rows) == whole


def test_the_work_travels_to_other_processes(model: PreTrainedModel) -> None:
    rows, _ = gather_rows(pairs_of(), MAX_LENGTH)
    work, sent = pickle.loads(pickle.dumps((score_rows, rows)))
    scores = score_rows(model, rows)
    assert pickle.loads(pickle.dumps(work(model, sent))) == scores
