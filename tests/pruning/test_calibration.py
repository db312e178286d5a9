"""Calibration windows are what the protocol says: windows of the joined text, drawn by seed, held-out ones apart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.calibration import CalibrationSet, sample_windows
from pruning.errors import PruningError
from tests.tiny import BOS, EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
_WORDS = ("prune", "head", "channel", "layer", "token", "window", "fox", "dog", "France", "question", "answer", "The")


def documents(count: int = 40, seed: int = 0) -> list[str]:
    """Documents that are all different, so that a window shows where it came from."""
    rng = random.Random(seed)
    return [f"Document {number}: " + " ".join(rng.choices(_WORDS, k=30)) + "." for number in range(count)]


def sample(texts: list[str] | None = None, **changes: Any) -> CalibrationSet:
    options: dict[str, Any] = {"num_samples": 5, "seq_len": 32, "seed": 0, "num_heldout": 2} | changes
    return sample_windows(TOKENIZER, documents() if texts is None else texts, **options)


def joined_ids(texts: list[str], seed: int, join: str = "\n\n") -> list[int]:
    """The whole text by plain tokenisation, in the documents' drawn order."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces = [TOKENIZER(texts[index] + join, add_special_tokens=False)["input_ids"] for index in order]
    return [token for piece in pieces for token in piece]


def found(window: list[int], ids: list[int]) -> list[int]:
    return [start for start in range(len(ids) - len(window) + 1) if ids[start : start + len(window)] == window]


def test_shapes_and_types() -> None:
    calibration = sample()
    assert calibration.input_ids_NL.shape == (5, 32)
    assert calibration.heldout_ids_ML.shape == (2, 32)
    assert calibration.input_ids_NL.dtype == calibration.heldout_ids_ML.dtype == torch.int64


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("join", ["\n\n", " "])
def test_windows_are_windows_of_the_joined_text(seed: int, join: str) -> None:
    texts = documents()
    ids = joined_ids(texts, seed, join)
    calibration = sample(texts, seed=seed, join=join, num_samples=20)
    ends = len(ids) - 2 * 32
    starts = [found(window, ids) for window in calibration.input_ids_NL.tolist()]
    assert all(starts)
    # held-out windows are the end of the text, and no other window reaches into it
    assert calibration.heldout_ids_ML.flatten().tolist() == ids[ends:]
    assert all(min(places) + 32 <= ends for places in starts)
    assert len({min(places) for places in starts}) > 10
    assert not {BOS, EOS} & set(calibration.input_ids_NL.flatten().tolist())


def test_windows_read_as_text() -> None:
    text = TOKENIZER.decode(sample().input_ids_NL[0].tolist())
    assert any(word in text for word in _WORDS)
    assert "�" not in text


def test_seed_decides() -> None:
    assert torch.equal(sample(seed=3).input_ids_NL, sample(seed=3).input_ids_NL)
    assert not torch.equal(sample(seed=3).input_ids_NL, sample(seed=4).input_ids_NL)


def test_a_global_seed_does_not_matter_nor_change() -> None:
    torch.manual_seed(1)
    first = sample().input_ids_NL
    state = torch.get_rng_state()
    assert torch.equal(sample().input_ids_NL, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_heldout() -> None:
    assert sample(num_heldout=0).heldout_ids_ML.shape == (0, 32)


def test_exactly_enough_tokens() -> None:
    texts = documents(6)
    length = len(joined_ids(texts, 0))
    calibration = sample(texts, num_samples=1, num_heldout=1, seq_len=length // 2)
    assert calibration.heldout_ids_ML.shape == (1, length // 2)


def test_too_few_tokens_names_the_numbers() -> None:
    texts = documents(2)
    have = len(joined_ids(texts, 0))
    with pytest.raises(PruningError) as error:
        sample(texts, num_samples=100, seq_len=32, source={"dataset": "tiny/news"})
    assert str(error.value) == (
        f"the calibration text of tiny/news has {have} tokens, fewer than the (100 + 2 held out) x 32 = 3264 asked "
        "for; lower num_samples or seq_len, or name a larger data set"
    )


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_at_all(texts: list[str]) -> None:
    with pytest.raises(PruningError, match=r"the calibration text has \d tokens, fewer than"):
        sample(texts)


def test_a_large_corpus_is_thinned_not_tokenised_whole() -> None:
    class Counting:
        seen = 0

        def __call__(self, texts: list[str], **options: Any) -> Any:
            self.seen += len(texts)
            return TOKENIZER(texts, **options)

    counting, texts = Counting(), documents(3000)
    calibration = sample_windows(counting, texts, num_samples=2, seq_len=16, seed=0)  # type: ignore[arg-type]
    assert counting.seen == 256  # one call is enough
    ids = joined_ids(texts, 0)
    assert all(found(window, ids) for window in calibration.input_ids_NL.tolist())


def test_documents_are_drawn_from_the_whole_corpus() -> None:
    # not the first ones of a corpus that may be sorted
    text = TOKENIZER.decode(sample(documents(3000), num_samples=40).input_ids_NL.flatten().tolist())
    numbers = [int(word.rstrip(":")) for word in text.split() if word.rstrip(":").isdigit() and word.endswith(":")]
    assert numbers
    assert max(numbers) > 1000


def test_source_tells_the_protocol() -> None:
    source = sample(source={"dataset": "tiny/news"}).source
    assert source == {
        "dataset": "tiny/news",
        "num_samples": 5,
        "num_heldout": 2,
        "seq_len": 32,
        "seed": 0,
        "join": "\n\n",
        "bos": "none",
    }


@pytest.mark.parametrize("num_heldout", [0, 2])
def test_save_and_load(num_heldout: int, tmp_path: Path) -> None:
    calibration = sample(num_heldout=num_heldout, source={"dataset": "tiny/news", "note": "déjà vu"})
    calibration.save(tmp_path)
    loaded = CalibrationSet.load(tmp_path)
    assert torch.equal(loaded.input_ids_NL, calibration.input_ids_NL)
    assert torch.equal(loaded.heldout_ids_ML, calibration.heldout_ids_ML)
    assert loaded.heldout_ids_ML.shape == (num_heldout, 32)
    assert loaded.source == calibration.source
