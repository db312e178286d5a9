"""What rows have in common is run once, and no score depends on it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from evaluation.inference import batches, shared_prefix
from evaluation.inference.loglikelihood import Pair, Row, gather_rows, score_answers, score_rows
from evaluation.inference.options import EvalOptions
from evaluation.inference.shared_prefix import Group, grouped, run_prefix
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from tests.tiny import FAMILIES, VOCAB_SIZE, random_plan, tiny_model

MAX_LENGTH = 512
Rows = list[tuple[int, ...]]


@pytest.fixture
def cheap_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing a few tokens is worth it."""
    monkeypatch.setattr(shared_prefix, "_FORWARD_PASS", 3)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every batch that is run, padding included, and of every prefix."""
    tokens: list[int] = []
    forward = torch.nn.Embedding.forward

    def counted(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if self.num_embeddings == VOCAB_SIZE:  # not one of positions
            tokens.append(ids.numel())
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    return tokens


def few_shot(*, subjects: int = 3, questions: int = 6, seed: int = 0) -> list[Pair]:
    """Questions after the examples of their subject, of which some share their beginning too, and one alone."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(2, VOCAB_SIZE) for _ in range(count)]

    intro = words(2)
    pairs: list[Pair] = [(words(7), words(2))]
    for _ in range(subjects):
        examples = intro + words(30)
        for number in range(questions):
            question = examples + words(rng.randint(1, 9))
            pairs += [(question, words(1 if number % 2 else rng.randint(1, 4))) for _ in range(3)]
    rng.shuffle(pairs)
    return pairs


def one_by_one(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[float]:
    """Every pair alone and whole."""
    found = []
    for context, answer in pairs:
        ids = torch.tensor([[*context, *answer][:-1]])
        with torch.no_grad():
            log_probs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        positions = range(len(context) - 1, len(context) + len(answer) - 1)
        found.append(sum(float(log_probs[place, token]) for place, token in zip(positions, answer, strict=True)))
    return found


def assert_right(
    model: PreTrainedModel, pairs: Sequence[Pair], options: EvalOptions = EvalOptions(), abs: float = 2e-5
) -> None:
    scores = score_answers(model, pairs, options, max_length=MAX_LENGTH)
    assert [score.log_likelihood for score in scores] == pytest.approx(one_by_one(model, pairs), abs=abs)


@pytest.mark.usefixtures("cheap_passes")
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_whole_rows_dense_and_pruned(family: str, run: list[int]) -> None:
    model, pairs = tiny_model(family), few_shot()
    assert_right(model, pairs)
    shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=2))
    run.clear()
    score_answers(model, pairs, EvalOptions(), max_length=MAX_LENGTH)
    rows, _ = gather_rows(pairs, MAX_LENGTH)
    assert sum(run) < sum(len(row.input_ids) for row in rows) / 2


@pytest.mark.usefixtures("cheap_passes")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_every_attention_and_batch(attention: str, batch_size: int | None) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    assert_right(model, few_shot(), EvalOptions(batch_size=batch_size))


@pytest.mark.usefixtures("cheap_passes")
def test_in_double_precision_nothing_is_left_of_the_difference() -> None:
    assert_right(tiny_model("llama").double(), few_shot(), abs=1e-12)


SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}


@pytest.mark.usefixtures("cheap_passes")
def test_layers_that_see_a_window_only(run: list[int]) -> None:
    """Shorter than what is shared, in all layers (Mistral) and in every other (Gemma 2)."""
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=8))
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, sliding_window=8, initializer_range=0.5))
    for model in (mistral.eval(), gemma.eval()):
        run.clear()
        score_answers(model, few_shot(subjects=1), EvalOptions(), max_length=MAX_LENGTH)
        assert 32 in run
        assert_right(model, few_shot())


@pytest.mark.usefixtures("cheap_passes")
def test_a_model_without_keys_and_values_runs_whole_rows() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2, state_size=4))
    assert run_prefix(model.eval(), torch.arange(5)) is None
    assert_right(model, few_shot(subjects=1))


def test_a_prefix_is_left_as_it_is_and_takes_any_number_of_rows() -> None:
    model, prefix = tiny_model("llama"), torch.arange(2, 12)
    with torch.no_grad():
        past = run_prefix(model, prefix)
        assert past is not None
        for rows in (3, 1):
            tails = torch.randint(2, VOCAB_SIZE, (rows, 4))
            after = model(input_ids=tails, past_key_values=past, use_cache=True).logits
            whole = model(input_ids=torch.cat([prefix.expand(rows, -1), tails], dim=1), use_cache=False).logits
            torch.testing.assert_close(after, whole[:, 10:], atol=1e-5, rtol=1e-5)
            assert past.get_seq_length() == 10


@pytest.mark.usefixtures("cheap_passes")
def test_memory_that_runs_short_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tiny_model("llama"), few_shot(subjects=1, questions=9)
    expected = one_by_one(model, pairs)

    def narrow(model: PreTrainedModel, rows: Sequence[Row]) -> list[Any]:
        if len(rows) > 4:
            raise torch.OutOfMemoryError
        return score_rows(model, rows)

    monkeypatch.setattr("evaluation.inference.loglikelihood.score_rows", narrow)
    scores = score_answers(model, pairs, EvalOptions(), max_length=MAX_LENGTH)
    assert [score.log_likelihood for score in scores] == pytest.approx(expected, abs=2e-5)


def test_what_is_shared_counts_towards_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch, run: list[int]) -> None:
    """322 shared tokens count as 40: with one of its own a row is one of 41."""
    monkeypatch.setattr(batches, "_TOKENS_CPU", 440)
    examples = [5] * 320
    pairs: list[Pair] = [([*examples, 7, 8, word], [9]) for word in range(10, 40)]
    score_answers(tiny_model("llama"), pairs, EvalOptions(), max_length=MAX_LENGTH)
    assert run == [322, 10] * 3


def in_batches(size: int) -> Callable[[int], int]:
    return lambda tokens: size


def best(rows: Rows, size: int) -> int:
    """Tokens that can be saved in batches of so many rows, by trying all of the tree."""
    if len(rows) == 1:
        return 0
    shared = next((n for n, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))
    count = math.ceil(len(rows) / size)
    together = (len(rows) - count) * shared - 3 * count
    longer = sorted(row for row in rows if len(row) > shared)
    parts = [list(part) for _, part in groupby(longer, key=lambda row: row[shared])]
    return max(0, together, sum(best(part, size) for part in parts))


@pytest.mark.usefixtures("cheap_passes")
def test_the_groups_save_most() -> None:
    rng = random.Random(0)
    for size in (99, 3, 1) * 100:
        rows = list({tuple(rng.randrange(2) for _ in range(rng.randint(1, 9))) for _ in range(rng.randint(1, 9))})
        groups = grouped(rows, [len(row) for row in rows], in_batches(size))
        assert sorted(index for group in groups for index in group.rows) == list(range(len(rows)))
        sharing = [group for group in groups if group.shared]
        for group in sharing:
            assert len({rows[index][: group.shared] for index in group.rows}) == 1
        assert sum(group.saved for group in sharing) == best(rows, size)


@pytest.mark.usefixtures("cheap_passes")
def test_no_more_is_shared_than_each_row_may() -> None:
    rows = [(1, 1, 1, 1, 1, 1, 1, n) for n in range(4)]
    assert grouped(rows, [8, 7, 5, 8], in_batches(9)) == [Group((0, 1, 2, 3), 5, saved=3 * 5 - 3)]
    assert grouped(rows, [0, 0, 0, 0], in_batches(9)) == [Group((0, 1, 2, 3), 0)]
    assert grouped([], [], in_batches(9)) == []


def test_endings_of_a_sentence_are_run_whole() -> None:
    """Four endings of fifty shared tokens are not worth a pass of their own: zero-shot figures stay what they are."""
    rows = [(*range(50), 100 + n) for n in range(4)]
    assert grouped(rows, [50] * 4, in_batches(99)) == [Group((0, 1, 2, 3), 0)]
    examples = [(*range(400), 500 + n) for n in range(4)]
    groups = grouped(rows + examples, [50] * 4 + [400] * 4, in_batches(99))
    assert groups == [Group((0, 1, 2, 3), 0), Group((4, 5, 6, 7), 400, saved=3 * 400 - 256)]
    assert grouped(examples, [400] * 4, in_batches(1)) == [Group((0, 1, 2, 3), 0)], "one row a batch shares with none"
