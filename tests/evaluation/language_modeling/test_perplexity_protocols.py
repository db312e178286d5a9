"""Every protocol against an independent computation: which token is predicted from what is written down once more, and
each prediction is one pass of a float64 model over its own context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.protocol import WindowProtocol
from tests.tiny import BOS, tiny_model, tiny_tokenizer

TEXTS = ["The quick brown fox.", "A", "", "What is the capital of France? Paris."]
WINDOW, STRIDE = 9, 4

Ids = list[int]
Predictions = list[tuple[Ids, int]]
"""Of one window: (context, token) for each token predicted."""

SIMPLE = list(
    itertools.product(
        ("none", "once", "per_window", "tokenizer"), (None, STRIDE), ("joined", "separate"), (False, True)
    )
)
ROLLING = list(itertools.product(("none", "once", "tokenizer"), (None, STRIDE), ("joined", "separate"), (False, True)))


@cache
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model("llama", layers=2), tiny_model("llama", layers=2).double()


@cache
def log_probabilities(context: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = models()[1](torch.tensor([context])).logits[0, -1]
    return logits.log_softmax(-1)


def units(tokenizer: PreTrainedTokenizerFast, bos: str, documents: str) -> list[Ids]:
    texts = ["\n\n".join(TEXTS)] if documents == "joined" else TEXTS
    units = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [[BOS, *ids] for ids in units] if bos in ("once", "tokenizer") else units


def windows_in_order(ids: Ids, stride: int | None, each_with_bos: bool) -> Iterator[tuple[bool, Predictions]]:
    """Whether the window is full, and what it predicts: by marking the tokens of the text that have been predicted."""
    head = [BOS] if each_with_bos else []
    room = WINDOW - len(head)
    seen: set[int] = set()
    for begin in range(0, len(ids), stride or room):
        piece = ids[begin : begin + room]
        found = [
            (head + piece[:offset], token)
            for offset, token in enumerate(piece)
            if head + piece[:offset] and begin + offset not in seen
        ]
        seen |= set(range(begin, begin + len(piece)))
        if found:
            yield len(piece) == room, found
        if begin + room >= len(ids):
            return


def rolling_windows(ids: Ids, stride: int | None) -> Iterator[tuple[bool, Predictions]]:
    """By lm-eval's own functions; a longer context than one token is what it calls context_len."""
    fresh = stride or WINDOW
    pieces = get_rolling_token_windows(ids, BOS, WINDOW, context_len=WINDOW - fresh + 1)
    for number, piece in enumerate(pieces):
        context, predicted = make_disjoint_window(piece)
        wanted = WINDOW if number == 0 else fresh
        yield len(predicted) == wanted, [(context + predicted[:i], token) for i, token in enumerate(predicted)]


def expected(windows: Sequence[Predictions]) -> tuple[float, int, list[float]]:
    """ppl, predicted tokens, and the sum of each window."""
    sums = [-sum(float(log_probabilities(tuple(c))[token]) for c, token in window) for window in windows]
    count = sum(map(len, windows))
    return math.exp(sum(sums) / count), count, sums


def kept(windows: Iterator[tuple[bool, Predictions]], partial: bool) -> list[Predictions]:
    found = list(windows)
    return [window for full, window in found if full or partial or not any(full for full, _ in found)]


def check(windows: list[Predictions], protocol: WindowProtocol) -> None:
    result = perplexity(models()[0], tiny_tokenizer(), TEXTS, protocol, EvalOptions(batch_size=3))
    ppl, count, sums = expected(windows)
    assert (len(result.scored), result.num_tokens) == (len(windows), count)
    assert result.ppl == pytest.approx(ppl, rel=1e-5)
    # the standard error of a ratio, in its textbook form: residuals about the ratio over windows
    sizes = torch.tensor([float(len(window)) for window in windows], dtype=torch.float64)
    residuals = torch.tensor(sums, dtype=torch.float64) - math.log(ppl) * sizes
    stderr = ppl * float(residuals.square().sum() / (len(sums) - 1) * len(sums)) ** 0.5 / count
    assert result.stderr == pytest.approx(stderr, rel=1e-4)


@pytest.mark.parametrize("bos, stride, documents, partial", SIMPLE)
def test_windows_in_order(bos: str, stride: int | None, documents: str, partial: bool) -> None:
    asked = {"bos": bos, "stride": stride, "documents": documents, "keep_last_partial": partial, "window": WINDOW}
    texts = units(tiny_tokenizer(), bos, documents)
    windows = [w for ids in texts for w in kept(windows_in_order(ids, stride, bos == "per_window"), partial)]
    check(windows, WindowProtocol.model_validate(asked))


@pytest.mark.parametrize("bos, stride, documents, partial", ROLLING)
def test_rolling_windows(bos: str, stride: int | None, documents: str, partial: bool) -> None:
    asked = {"bos": bos, "stride": stride, "documents": documents, "keep_last_partial": partial, "window": WINDOW}
    # the one BOS is what the text is predicted from, and not a token of it
    texts = units(tiny_tokenizer(), "none" if bos == "once" else bos, documents)
    windows = [window for ids in texts for window in kept(rolling_windows(ids, stride), partial)]
    check(windows, WindowProtocol.model_validate(asked | {"rolling": True}))


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 5])
def test_some_of_the_windows(rolling: bool, seed: int | None) -> None:
    (ids,) = units(tiny_tokenizer(), "none" if rolling else "once", "joined")
    windows = kept(rolling_windows(ids, None) if rolling else windows_in_order(ids, None, False), True)
    order = list(range(len(windows)))
    if seed is not None:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    protocol = WindowProtocol(
        window=WINDOW, rolling=rolling, max_windows=3, window_seed=seed, keep_last_partial=True, bos="once"
    )
    check([windows[number] for number in order[:3]], protocol)


def test_rolling_predicts_every_token_unless_it_is_told_otherwise() -> None:
    assert WindowProtocol(window=WINDOW, rolling=True).keep_last_partial
    assert not WindowProtocol(window=WINDOW).keep_last_partial
    result = perplexity(models()[0], tiny_tokenizer(), TEXTS, WindowProtocol(window=WINDOW, rolling=True, bos="none"))
    assert result.num_tokens == len(units(tiny_tokenizer(), "none", "joined")[0])


def test_rolling_begins_with_eos_where_there_is_no_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    protocol = WindowProtocol(window=64, rolling=True, bos="none")
    (ids,) = units(tokenizer, "none", "joined")
    (eos,) = tokenizer("</s>", add_special_tokens=False)["input_ids"]
    ppl, _, _ = expected([[([eos, *ids[:i]], token) for i, token in enumerate(ids)]])
    assert perplexity(models()[0], tokenizer, TEXTS, protocol).ppl == pytest.approx(ppl, rel=1e-5)


def test_the_sliding_window_of_the_transformers_documentation() -> None:
    """Its loop over labels of -100, with the number of tokens as they are."""
    model, tokenizer = models()[0], tiny_tokenizer()
    ids = torch.tensor(units(tokenizer, "none", "joined"))
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], STRIDE):
        end = min(begin + WINDOW, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        predicted = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * predicted, count + predicted, end
        if end == ids.shape[1]:
            break
    protocol = WindowProtocol(window=WINDOW, stride=STRIDE, bos="none", keep_last_partial=True)
    result = perplexity(model, tokenizer, TEXTS, protocol)
    assert result.num_tokens == count == ids.shape[1] - 1
    assert result.ppl == pytest.approx(math.exp(total / count), rel=1e-6)
