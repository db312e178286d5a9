from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import evaluation.language_modeling.perplexity as module
from evaluation.errors import EvaluationError
from evaluation.inference import logits as logits_module
from evaluation.inference.logits import rows_per_forward
from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import Scored, perplexity, summary, window_nlls
from evaluation.language_modeling.protocol import WindowProtocol
from evaluation.language_modeling.windows import Window, select_windows, windows_of
from tests.tiny import BOS, FAMILIES, VOCAB_SIZE, random_ids, tiny_model

TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog, {i * i} times." for i in range(12)]


def ids_of(tokenizer: PreTrainedTokenizerFast, texts: list[str], join: str = "\n\n") -> list[int]:
    return list(tokenizer(join.join(texts), add_special_tokens=False)["input_ids"])


def cut(tokenizer: PreTrainedTokenizerFast, protocol: WindowProtocol, texts: list[str] = TEXTS) -> list[list[int]]:
    return [window.inputs.tolist() for window in windows_of(tokenizer, texts, protocol)]


def window_nll(model: PreTrainedModel, ids_BL: torch.Tensor) -> torch.Tensor:
    """Sum of each row, of which all but the first token is predicted: (B,)."""
    rows = [Window(number, ids, ids[1:], 0) for number, ids in enumerate(ids_BL.numpy())]
    return torch.tensor(window_nlls(model, rows), dtype=torch.float64)


def scored(sums: list[float], tokens: list[int]) -> list[Scored]:
    ids = torch.zeros(max(tokens) + 1, dtype=torch.long).numpy()
    return [Scored(Window(0, ids, ids[:count], 0), nll) for nll, count in zip(sums, tokens, strict=True)]


def test_uniform_logits_give_the_vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, tokenizer, TEXTS, WindowProtocol(window=16), EvalOptions(batch_size=3))
    assert result.ppl == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert result.stderr == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_window_equals_the_hugging_face_loss(family: str) -> None:
    model = tiny_model(family)
    ids = random_ids(model, batch=1, length=40)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert float(window_nll(model, ids)) / 39 == pytest.approx(expected, rel=1e-6)


def test_batches_do_not_change_the_figure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    protocol = WindowProtocol(window=24, keep_last_partial=True)
    one = perplexity(model, tokenizer, TEXTS, protocol, EvalOptions(batch_size=1))
    many = perplexity(model, tokenizer, TEXTS, protocol, EvalOptions(batch_size=5))
    assert many.nll == pytest.approx(one.nll, rel=1e-6)
    assert many.num_tokens == one.num_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_shorter_windows_in_a_batch_do_not_change(family: str) -> None:
    model = tiny_model(family)
    rows = [Window(0, ids, ids[1:], 0) for n in (30, 17, 2) for ids in random_ids(model, 1, n, seed=n).numpy()]
    assert window_nlls(model, rows) == pytest.approx([window_nlls(model, [row])[0] for row in rows], rel=1e-6)


def test_a_batch_is_no_larger_than_its_logits_may_be(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = windows_of(tokenizer, TEXTS, WindowProtocol(window=24, keep_last_partial=True, bos="none"))
    sizes = [len(batch) for batch in module.batches_of(windows, [model], EvalOptions())]
    assert sizes == [len(windows)]  # all of them fit into the tokens that keep a CPU busy
    monkeypatch.setattr(logits_module, "_LOGITS_BYTES", 4 * VOCAB_SIZE * 24 * 3)
    assert max(len(batch) for batch in module.batches_of(windows, [model], EvalOptions())) == 3
    assert max(len(batch) for batch in module.batches_of(windows, [model], EvalOptions(batch_size=2))) == 2


def test_slices_of_the_logits_do_not_change_the_figure(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(model, batch=3, length=20)
    whole = window_nll(model, ids)
    monkeypatch.setattr(module, "_FLOAT32_BYTES", 4 * VOCAB_SIZE * 7)
    torch.testing.assert_close(window_nll(model, ids), whole)


def test_bfloat16_logits_are_summed_in_float32(model: PreTrainedModel) -> None:
    half = model.to(torch.bfloat16)
    ids = random_ids(model, batch=1, length=30)
    with torch.no_grad():
        logits = half(input_ids=ids).logits[0, :-1].float()
    expected = -logits.log_softmax(-1).gather(1, ids[0, 1:, None]).double().sum()
    torch.testing.assert_close(window_nll(half, ids)[0], expected, rtol=1e-6, atol=0)


def test_a_large_vocabulary_runs_fewer_windows_at_once() -> None:
    assert rows_per_forward(vocab=128_256, length=2048, itemsize=2, batch_size=16) == 1
    assert rows_per_forward(vocab=32_000, length=128, itemsize=2, batch_size=16) == 16


def test_bos_goes_where_it_is_asked_and_never_by_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("a")["input_ids"][0] == BOS, "this tokenizer would add one"
    ids = ids_of(tokenizer, TEXTS)

    none = cut(tokenizer, WindowProtocol(window=16, bos="none"))
    once = cut(tokenizer, WindowProtocol(window=16, bos="once"))
    each = cut(tokenizer, WindowProtocol(window=16, bos="per_window"))

    assert list(chain.from_iterable(none)) == ids[: len(ids) // 16 * 16]
    assert list(chain.from_iterable(once)) == [BOS, *ids][: (len(ids) + 1) // 16 * 16]
    assert cut(tokenizer, WindowProtocol(window=16, bos="tokenizer")) == once
    assert each[0] == [BOS, *ids[:15]]
    assert each[1] == [BOS, *ids[15:30]]
    assert len(each) == len(ids) // 15


@pytest.mark.parametrize("bos", ["once", "per_window"])
def test_bos_of_a_tokenizer_without_one_is_refused(tokenizer: PreTrainedTokenizerFast, bos: str) -> None:
    tokenizer.bos_token = None
    with pytest.raises(EvaluationError, match=f"bos='{bos}'.*no BOS token"):
        windows_of(tokenizer, TEXTS, WindowProtocol.model_validate({"window": 16, "bos": bos}))
    assert windows_of(tokenizer, TEXTS, WindowProtocol(window=16, bos="none"))


def test_the_join_string_is_tokenised_between_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    (window,) = cut(tokenizer, WindowProtocol(window=512, bos="none", join=" | "), ["ab", "cd"])
    assert tokenizer.decode(window) == "ab | cd"


def test_the_last_window_is_weighted_by_its_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, TEXTS)
    length = next(n for n in range(20, 60) if len(ids) % n >= 2)
    full = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    rest = torch.tensor([ids[full.numel() :]])
    total = float(window_nll(model, full).sum() + window_nll(model, rest).sum())
    tokens = full.shape[0] * (length - 1) + rest.shape[1] - 1

    protocol = WindowProtocol(window=length, bos="none", keep_last_partial=True)
    result = perplexity(model, tokenizer, TEXTS, protocol, EvalOptions(batch_size=4))

    assert result.num_tokens == tokens
    assert len(result.scored) == full.shape[0] + 1
    assert result.ppl == pytest.approx(math.exp(total / tokens), rel=1e-6)


def test_a_rest_of_one_token_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, TEXTS)
    protocol = WindowProtocol(window=len(ids) - 1, bos="none", keep_last_partial=True)
    assert [len(window) for window in cut(tokenizer, protocol)] == [len(ids) - 1]


def test_windows_are_chosen_as_protocol_p1_says(tokenizer: PreTrainedTokenizerFast) -> None:
    protocol = WindowProtocol(window=8, bos="none", max_windows=8, window_seed=1)
    windows = windows_of(tokenizer, TEXTS, protocol)
    ids = torch.tensor(ids_of(tokenizer, TEXTS))
    count = len(ids) // 8
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:8]

    chosen = select_windows(windows, protocol)

    assert len(windows) == count
    assert [window.inputs.tolist() for window in chosen] == ids[: count * 8].view(count, 8)[order].tolist()
    assert [window.number for window in chosen] == order.tolist()
    assert select_windows(windows, WindowProtocol(window=8)) == windows


def test_a_text_shorter_than_the_window_is_measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    result = perplexity(model, tokenizer, ["The quick brown fox"], WindowProtocol(window=256, bos="none"))
    assert len(result.scored) == 1
    assert result.stderr is None
    assert result.num_tokens == len(ids_of(tokenizer, ["The quick brown fox"])) - 1


@pytest.mark.parametrize("texts", [[], [""]])
def test_too_short_a_text_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    for bos in ("none", "once", "per_window"):
        protocol = WindowProtocol.model_validate({"window": 16, "bos": bos})
        with pytest.raises(EvaluationError, match="hold 0 tokens"):
            perplexity(model, tokenizer, texts, protocol)


def test_the_standard_error_shrinks_with_the_windows_and_covers_the_truth(model: PreTrainedModel) -> None:
    sums = window_nll(model, random_ids(model, batch=64, length=16)).tolist()
    few = summary(scored(sums[:16], [15] * 16), WindowProtocol(window=16))
    all_ = summary(scored(sums, [15] * 64), WindowProtocol(window=16))
    assert few.stderr is not None
    assert all_.stderr is not None
    assert all_.stderr < few.stderr
    # For equal windows the delta method is the textbook standard error of the mean, times ppl.
    means = torch.tensor(sums, dtype=torch.float64) / 15
    assert all_.stderr == pytest.approx(float(means.std()) / 8 * all_.ppl, rel=1e-9)


def test_nan_is_an_error_and_no_figure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(EvaluationError, match=r"NaN.*float32"):
        perplexity(model, tokenizer, TEXTS, WindowProtocol(window=16))


def test_a_hopeless_model_has_an_infinite_ppl() -> None:
    assert summary(scored([8e5, 7e5], [1000, 1000]), WindowProtocol(window=1001)).ppl == math.inf


def test_a_window_beyond_the_models_positions_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(EvaluationError, match=r"window of 513 tokens.*max_position_embeddings of 512"):
        perplexity(model, tokenizer, TEXTS, WindowProtocol(window=513))


def test_the_model_comes_back_in_its_mode(model: PreTrainedModel) -> None:
    model.train()
    window_nll(model, random_ids(model))
    assert model.training
