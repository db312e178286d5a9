"""Corpora that were published as separated words ("the 1 @,@ 000 men , who"), written as text again.

Only so much as lm-eval does for its task wikitext, whose figures are over the result; the rules go back to Megatron-LM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_BEFORE_BRACKETS = (
    ("s '", "s'"),
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_AFTER_BRACKETS = (
    *((" ".join("=" * level), "=" * level) for level in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_BRACKETS = tuple(
    (re.compile(rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"), opening, closing)
    for opening, closing in ("()", "[]", "{}", '""', "''")
)


def wikitext(text: str) -> str:
    """A page of WikiText as lm-eval's task wikitext (version 2.0) gives it to the model."""
    for separated, written in _BEFORE_BRACKETS:
        text = text.replace(separated, written)
    for pattern, opening, closing in _BRACKETS:
        text = pattern.sub(rf"{opening}\1{closing}", text)
    for separated, written in _AFTER_BRACKETS:
        text = text.replace(separated, written)
    return text


DETOKENIZERS: Mapping[str | None, Callable[[str], str]] = {None: str, "wikitext": wikitext}
