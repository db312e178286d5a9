"""What a BPE writes without a token, and which tokens a corpus can best do without."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
from tokenizers import Tokenizer

from pruning.errors import PruningError
from pruning.vocabulary.selection import rows_after, select_rows, with_parts
from pruning.vocabulary.spelling import Spelling, spellings
from tests.tiny import sentencepiece_tokenizer, tiny_tokenizer

#: h e l o w r d, and what is merged of them, one after the other
MODEL: dict[str, Any] = {
    "type": "BPE",
    "vocab": {token: number for number, token in enumerate(["h", "e", "l", "o", "he", "ll", "lo", "hell", "hello"])},
    "merges": ["h e", ["l", "l"], ["l", "o"], "he ll", "hell o"],
}


def merges_of(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]  # type: ignore[no-any-return]


def kept_of(counts: list[int], after: int, required: Iterable[int] = range(4)) -> tuple[tuple[int, ...], int]:
    chosen = select_rows(counts, spellings(MODEL), frozenset(required), range(9), after)
    return chosen.kept, chosen.added_tokens


def test_a_token_is_spelled_with_what_its_last_merge_joins() -> None:
    assert spellings(MODEL) == {
        4: Spelling((0, 1), merged=True),
        5: Spelling((2, 2), merged=True),
        6: Spelling((2, 3), merged=True),
        7: Spelling((4, 5), merged=True),
        8: Spelling((7, 3), merged=True),
    }


def test_a_token_that_no_merges_make_is_spelled_with_what_they_do_make() -> None:
    """Whole words are looked for first by some (`ignore_merges`)."""
    model = MODEL | {"vocab": MODEL["vocab"] | {"olleh": 9}, "ignore_merges": True}
    assert spellings(model)[9] == Spelling((3, 5, 1, 0), merged=False)


def test_characters_fall_back_on_bytes_or_cannot_be_spelled() -> None:
    tokens = ["é", *(f"<0x{byte:02X}>" for byte in range(256)), "éé"]
    model = {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": [["é", "é"]]}
    assert spellings(model) == {257: Spelling((0, 0), merged=True)}
    found = spellings(model | {"byte_fallback": True})
    assert found == {0: Spelling((1 + 0xC3, 1 + 0xA9), merged=False), 257: Spelling((0, 0), merged=True)}


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_tokenizer])
def test_spellings_are_what_the_tokenizer_writes_without_the_token(make: Any) -> None:
    """One token at a time is taken out of the library's own BPE, with the merges that need it."""
    model = merges_of(make())
    names = {number: token for token, number in model["vocab"].items()}
    spelled = spellings(model)
    merged = [number for number, spelling in spelled.items() if spelling.merged]
    assert len(merged) > 40
    for number in merged[::7]:
        token = names[number]
        left = {name: index for index, name in enumerate(name for name in model["vocab"] if name != token)}
        merges = [pair for pair in model["merges"] if token not in {*pair, "".join(pair)}]
        own = json.dumps({"model": model | {"vocab": left, "merges": merges}})
        assert Tokenizer.from_str(own).encode(token).tokens == [names[piece] for piece in spelled[number].pieces]


def test_what_costs_fewest_tokens_goes_first_and_never_a_part_of_what_stays() -> None:
    counts = [9, 9, 9, 9, 0, 1, 7, 0, 8]
    # "he" and "hell" are rarer than anything, but "hello" is made of them
    assert kept_of(counts, 8) == ((0, 1, 2, 3, 4, 5, 7, 8), 7)
    # then "hello" as "hell" "o", and so there are 8 of "hell", ...
    assert kept_of(counts, 7) == ((0, 1, 2, 3, 4, 5, 7), 7 + 8)
    assert kept_of(counts, 4) == ((0, 1, 2, 3), 7 + 8 + 8 + 8 + 9)
    assert kept_of([1] * 4 + [0] * 5, 7) == (tuple(range(7)), 0)  # of equally rare ones the last


def test_required_tokens_stay_with_all_that_they_are_made_of() -> None:
    assert with_parts([7], spellings(MODEL)) == {7, 4, 5, 0, 1, 2}
    kept, _ = kept_of([0] * 9, 7, with_parts([*range(4), 7], spellings(MODEL)))
    assert kept == (0, 1, 2, 3, 4, 5, 7)


def test_rows_of_no_token_go_before_any_token_and_from_the_end() -> None:
    chosen = select_rows([0] * 12, spellings(MODEL), frozenset(range(4)), range(9), 10)
    assert chosen.kept == tuple(range(10))
    chosen = select_rows([0] * 12, spellings(MODEL), frozenset(range(4)), range(9), 8)
    assert chosen.kept == tuple(range(8))


def test_the_longer_text_is_foretold() -> None:
    """Where pieces do not join what stands beside them, exactly."""
    model, text = merges_of(tiny_tokenizer()), "the capital of France is the instruction that describes Pruning " * 3
    whole = Tokenizer.from_str(json.dumps({"model": model}))
    words = [whole.encode(word).ids for word in text.split()]
    counts = [0] * len(model["vocab"])
    for number in chain.from_iterable(words):
        counts[number] += 1
    spelled = spellings(model)
    required = frozenset(range(len(counts))) - spelled.keys()
    chosen = select_rows(counts, spelled, required, range(len(counts)), 264)
    names = {number: token for token, number in model["vocab"].items()}
    vocab = {names[old]: new for new, old in enumerate(chosen.kept)}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocab.keys()]
    smaller = Tokenizer.from_str(json.dumps({"model": model | {"vocab": vocab, "merges": merges}}))
    longer = sum(len(smaller.encode(word).ids) for word in text.split()) - sum(map(len, words))
    assert 0 < longer <= chosen.added_tokens


@pytest.mark.parametrize(
    "sparsity, multiple, required, words",
    [
        (0.05, 64, 10, "sparsity 0.05 of a vocabulary of 320 is less than half of the multiple of 64"),
        (0.8, 64, 100, "would leave 64 of a vocabulary of 320, of which 100 must stay .* at most 0.600, or lower"),
        (0.9, 128, 1, "would leave 0 of"),
    ],
)
def test_what_cannot_be_reached_is_refused(sparsity: float, multiple: int, required: int, words: str) -> None:
    with pytest.raises(PruningError, match=words):
        rows_after(sparsity, 320, multiple, required)


@pytest.mark.parametrize("sparsity, multiple, after", [(0.2, 64, 256), (0.2, 1, 256), (0.3, 1, 224), (0.37, 50, 200)])
def test_rows_come_in_multiples(sparsity: float, multiple: int, after: int) -> None:
    assert rows_after(sparsity, 320, multiple, 1) == after
