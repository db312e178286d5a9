"""Packed text: every token once, documents apart, held-out windows of other documents, made once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.errors import PruningError
from pruning.recovery._session import check_documents_apart
from pruning.recovery.cpt import Config
from pruning.training.batches import IGNORED, collate, count_predicted
from pruning.training.objectives import CrossEntropy, forward
from pruning.training.packing import Windows, pack
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

TEXTS = [f"document {number} says " + "word " * (number % 7) + "and ends" for number in range(40)]


def texts() -> Iterator[str]:
    yield from TEXTS


def packed(folder: Path, **options: Any) -> tuple[Windows, Windows]:
    asked: dict[str, Any] = {"num_tokens": 32 * 6, "seq_len": 32, "num_heldout": 2, "across": False, "identity": "x"}
    return pack(tiny_tokenizer(), texts, folder=folder, **(asked | options))


def tokens_of(windows: Windows) -> list[int]:
    return [token for index in range(len(windows)) for token in windows[index]["input_ids"].tolist()]


def test_every_token_once_and_each_document_ends(tmp_path: Path) -> None:
    train, heldout = packed(tmp_path)
    tokenizer = tiny_tokenizer()
    assert (len(train), len(heldout)) == (6, 2)
    documents = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(TEXTS)["input_ids"]]
    stream = [token for ids in documents for token in ids]
    held = tokens_of(heldout)
    assert held == stream[: 2 * 32]
    # what was left of the document that the last held-out window cut is not trained on
    ends = [sum(len(ids) for ids in documents[:count]) for count in range(len(documents))]
    begin = min(end for end in ends if end >= 2 * 32)
    assert tokens_of(train) == stream[begin : begin + 6 * 32]


def test_a_document_attends_to_nothing_before_it_and_its_first_token_is_not_predicted(tmp_path: Path) -> None:
    train, _ = packed(tmp_path)
    for index in range(len(train)):
        example = train[index]
        starts = (example["position_ids"] == 0).nonzero().flatten().tolist()
        assert starts[0] == 0
        assert (example["labels"][starts] == IGNORED).all()
        others = [place for place in range(32) if place not in starts]
        assert torch.equal(example["labels"][others], example["input_ids"][others])
        bos = tiny_tokenizer().bos_token_id
        assert all(example["input_ids"][start] == bos for start in starts[1:])


def test_a_family_that_does_not_keep_documents_apart_is_refused() -> None:
    apart, across = Config(), Config.model_validate({"cross_document_attention": True})
    check_documents_apart(tiny_model("llama"), apart)
    check_documents_apart(tiny_model("opt"), across)
    with pytest.raises(PruningError, match="opt model does not keep packed documents apart: set cross_document"):
        check_documents_apart(tiny_model("opt"), apart)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "opt"])
def test_packed_documents_have_the_logits_that_they_have_alone(name: str, tmp_path: Path) -> None:
    model, (train, _) = tiny_model(name), packed(tmp_path)
    batch = collate(0)([train[0], train[1]])
    with torch.no_grad():
        together = forward(model, batch).logits
        for row in range(2):
            starts = [*(train[row]["position_ids"] == 0).nonzero().flatten().tolist(), 32]
            for begin, end in pairwise(starts):
                alone = model(train[row]["input_ids"][None, begin:end], use_cache=False).logits
                torch.testing.assert_close(together[row, begin:end], alone[0], atol=2e-4, rtol=1e-4)


def test_across_documents_is_one_text(tmp_path: Path) -> None:
    train, _ = packed(tmp_path, across=True)
    assert set(train[0]) == {"input_ids", "labels"}
    batch = collate(0)([train[0], train[1]])
    assert count_predicted(batch) == 2 * 31
    model = tiny_model("llama")
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(CrossEntropy()(model, batch), expected)


def test_tokens_are_made_once_for_one_identity(tmp_path: Path) -> None:
    first, _ = packed(tmp_path)

    def other() -> Iterator[str]:
        yield from (text.replace("says", "said") for text in TEXTS)

    options: dict[str, Any] = {"num_tokens": 32 * 6, "seq_len": 32, "num_heldout": 2, "across": False}
    again, _ = pack(tiny_tokenizer(), other, folder=tmp_path, identity="x", **options)
    assert tokens_of(again) == tokens_of(first)
    changed, _ = pack(tiny_tokenizer(), other, folder=tmp_path, identity="y", **options)
    assert tokens_of(changed) != tokens_of(first)
    assert repr(changed) != repr(first) == repr(again)


def test_too_little_text_and_no_eos_are_said(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"the training text has \d+ tokens, fewer than the 3125 windows"):
        packed(tmp_path, num_tokens=100_000)
    with pytest.raises(PruningError, match="num_tokens 31 is less than one window of seq_len 32"):
        packed(tmp_path, num_tokens=31)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(PruningError, match="no EOS token, without which documents run into each other"):
        pack(tokenizer, texts, num_tokens=64, seq_len=32, num_heldout=0, across=False, folder=tmp_path, identity="x")
