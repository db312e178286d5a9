"""Texts as token ids, with the words and bytes that each token stands for.

Shapes: T tokens of a stream, C characters of its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.errors import EvaluationError
from evaluation.language_modeling.protocol import WindowSelection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int64]
Counts = NDArray[np.float64]

_WORD = re.compile(r"\S+")

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
"""WikiText was published as separated words ("the 1 @,@ 000 men , who"). Only so much is undone as lm-eval does for its
task wikitext, whose figures are over the result; the rules go back to Megatron-LM."""


@dataclass(frozen=True, eq=False)
class Stream:
    """What windows are cut from: the joined texts, or one document.

    ids: (T,). words, bytes: (T + 1,), how many of the original text lie before token t, as `windows.Normalisation`
    says; zeros where the selection does not ask for them.
    """

    ids: Ids
    words: Counts
    bytes: Counts


def streams_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], selection: WindowSelection
) -> Iterator[Stream]:
    """One stream for the joined texts, or one for each.

    The tokenizer adds BOS by itself only if `bos` is "tokenizer": some do by default and some do not, and otherwise the
    figure must not depend on it. Raises EvaluationError for a BOS token asked of a tokenizer without one, and for words
    or bytes asked of a tokenizer that cannot say where its tokens lie.
    """
    if selection.normalise and not tokenizer.is_fast:
        raise EvaluationError(
            f"normalise needs to know where tokens lie in the text, which the slow tokenizer "
            f"{type(tokenizer).__name__} does not tell; leave normalise out"
        )
    written = wikitext_detokenized if selection.detokenizer == "wikitext" else str
    if selection.documents == "separate":
        for text in texts:
            yield _stream(tokenizer, text, written(text), selection)
    else:
        yield _stream(tokenizer, selection.join.join(texts), selection.join.join(map(written, texts)), selection)


def bos_id(tokenizer: PreTrainedTokenizerBase, selection: WindowSelection) -> int:
    """The BOS token. Raises EvaluationError if there is none."""
    bos: Any = tokenizer.bos_token_id
    if bos is None:
        raise EvaluationError(
            f"bos='{selection.bos}' is asked, but the tokenizer {type(tokenizer).__name__} has no BOS token; "
            "set bos: none"
        )
    return int(bos)


def _stream(tokenizer: PreTrainedTokenizerBase, original: str, text: str, selection: WindowSelection) -> Stream:
    encoded: Any = tokenizer(
        text,
        add_special_tokens=selection.bos == "tokenizer",
        return_offsets_mapping=bool(selection.normalise),
        verbose=False,
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    words = bytes_ = np.zeros(len(ids) + 1)
    if selection.normalise and len(ids):
        ends = np.asarray(encoded["offset_mapping"], dtype=np.int64)[:, 1]
        words, bytes_ = _counts(text, ends)
        total = len(re.split(r"\s+", original)) if "lm_eval_word" in selection.normalise else len(original.split())
        # a text of white space alone has no word to count, but lm-eval counts its ends
        words = _scaled(words if words[-1] else bytes_, total)
        bytes_ = _scaled(bytes_, len(original.encode()))
    if selection.bos == "once":
        head = np.array([bos_id(tokenizer, selection)], dtype=np.int64)
        ids, words, bytes_ = np.concatenate([head, ids]), np.append(0.0, words), np.append(0.0, bytes_)
    return Stream(ids, words, bytes_)


def _counts(text: str, ends: Ids) -> tuple[Counts, Counts]:
    """Words that begin, and bytes that lie, before each token and before the end: (T + 1,) each.

    ends: (T,), the character after each token. Where tokens share a character (its bytes are split between them) the
    first has it whole; characters of no token, such as trimmed spaces, go with the next one.
    """
    bounds_C = np.append(0, np.maximum.accumulate(ends))
    bounds_C[-1] = len(text)
    codes_C = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes_C = 1 + (codes_C >= 0x80).astype(np.int64) + (codes_C >= 0x800) + (codes_C >= 0x10000)
    starts = np.array([word.start() for word in _WORD.finditer(text)], dtype=np.int64)
    words = np.searchsorted(starts, bounds_C, side="left").astype(np.float64)
    return words, np.append(0, np.cumsum(sizes_C))[bounds_C].astype(np.float64)


def _scaled(before: Counts, total: int) -> Counts:
    """The counts with another total: what a detokeniser took away or lm-eval counts more is shared alike."""
    return before * (total / before[-1]) if before[-1] else before


def wikitext_detokenized(text: str) -> str:
    """A page of WikiText as lm-eval's task wikitext (version 2.0) gives it to the model."""
    for separated, written in _BEFORE_BRACKETS:
        text = text.replace(separated, written)
    for pattern, opening, closing in _BRACKETS:
        text = pattern.sub(rf"{opening}\1{closing}", text)
    for separated, written in _AFTER_BRACKETS:
        text = text.replace(separated, written)
    return text
