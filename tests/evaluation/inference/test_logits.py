"""Logits of long windows and large vocabularies are never all there, and the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from evaluation.inference import logits
from evaluation.inference.logits import logits_of
from evaluation.language_modeling import perplexity
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from tests.tiny import FAMILIES, VOCAB_SIZE, random_ids, random_plan, tiny_model

START = 7


@pytest.fixture
def small_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of three positions is more than may be there at once."""
    monkeypatch.setattr(logits, "_LOGITS_BYTES", 4 * VOCAB_SIZE * 2)


def heads_run(model: PreTrainedModel, sizes: list[int]) -> None:
    """Note how many positions every call of the head makes logits of."""
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, made: sizes.append(made.numel() // made.shape[-1]))


def assert_right(model: PreTrainedModel) -> None:
    ids = random_ids(model, batch=2, length=20)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        part = logits_of(model, ids, START)
        for row, begin, end in ((0, START, START + 3), (1, 12, 20), (0, 19, 20)):
            torch.testing.assert_close(part(row, begin, end), whole[row, begin:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_whole_and_in_slices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=2))
    assert_right(model)
    monkeypatch.setattr(logits, "_LOGITS_BYTES", 4 * VOCAB_SIZE * 2)
    assert_right(model)


@pytest.mark.usefixtures("small_cap")
def test_no_more_logits_are_there_than_the_cap_and_a_slice(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 positions in slices of five, after a look at two tokens, with the hidden states and with the model's own."""
    monkeypatch.setattr(perplexity, "_FLOAT32_BYTES", 4 * VOCAB_SIZE * 5)
    sizes: list[int] = []
    heads_run(model, sizes)
    window = perplexity.Window(
        0, *(random_ids(model, 1, 65, seed=1).numpy()[0][cut] for cut in (slice(0, 64), slice(1, 65))), 0
    )
    perplexity.window_nlls(model, [window])
    assert sizes == [2, 2, *[5] * 12, 4]


def test_only_what_is_predicted_gets_logits(model: PreTrainedModel) -> None:
    sizes: list[int] = []
    heads_run(model, sizes)
    ids = random_ids(model, 1, 65, seed=1).numpy()[0]
    perplexity.window_nlls(model, [perplexity.Window(0, ids[:64], ids[57:65], 56)])
    assert sizes == [8]


SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}


@pytest.mark.usefixtures("small_cap")
def test_a_model_that_changes_its_heads_logits_has_them_all() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=0.3, initializer_range=0.5)
    assert_right(Gemma2ForCausalLM(config).eval())
