"""Runs of 13 words: what counts as one, and how many texts have one."""

from __future__ import annotations

from infra.overlap.words import shared_grams, word_grams

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_case_and_punctuation_do_not_matter() -> None:
    assert word_grams("One, two: THREE\nfour five six seven eight nine ten eleven twelve (thirteen)!") == {THIRTEEN}


def test_of_twelve_words_there_is_no_run() -> None:
    assert word_grams(THIRTEEN.removesuffix(" thirteen")) == set()
    assert len(word_grams(f"{THIRTEEN} fourteen fifteen")) == 3


def test_texts_are_counted_that_share_a_run() -> None:
    texts = [f"zero {THIRTEEN}", "nothing of it", f"{THIRTEEN} {THIRTEEN}", THIRTEEN.removesuffix(" thirteen")]
    shared = shared_grams(texts, word_grams(f"before it {THIRTEEN} and after it"))
    assert shared.num_texts == 2
    assert shared.example == THIRTEEN
    assert shared_grams(texts[1:2], word_grams(THIRTEEN)) == (0, "")
