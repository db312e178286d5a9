"""Runs of words that texts share: how overlap between data sets is found (GPT-3, arXiv 2005.14165, appendix C)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

GRAM = 13
"""Words in a row that are no accident: the longest that GPT-3's authors compare."""


class Shared(NamedTuple):
    """How many of some texts have a run of words in common with others, and the first such run ("" if none has)."""

    num_texts: int
    example: str


def word_grams(text: str, length: int = GRAM) -> set[str]:
    """Runs of `length` words, lower case and without punctuation; of a text of fewer words there are none."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}


def shared_grams(texts: Sequence[str], grams: Collection[str]) -> Shared:
    """How many of the texts have one of these runs of words. A text of fewer than GRAM words cannot have one, whatever
    it says: short questions and answers are found by where they come from, not by their words."""
    found = [common for text in texts if (common := {gram for gram in word_grams(text) if gram in grams})]
    return Shared(len(found), min(found[0]) if found else "")
