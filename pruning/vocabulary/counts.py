"""How often the tokens of a vocabulary occur in a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pruning.errors import PruningError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS_PER_CALL = 256


def count_tokens(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterator[str],
    num_rows: int,
    num_tokens: int | None,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> NDArray[np.int64]:
    """By row of an embedding with so many, how often the texts have its token: (num_rows,) int64.

    Texts are read until there are num_tokens tokens, and the one with which there are is counted whole; None: all of
    them. Special tokens that the tokenizer puts around a text are not counted. Raises PruningError if there are fewer.
    """
    counts, found = np.zeros(num_rows, dtype=np.int64), 0
    while some := list(islice(texts, _TEXTS_PER_CALL)):
        ids: list[int] = []
        for of_text in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += of_text
            if num_tokens is not None and found + len(ids) >= num_tokens:
                break
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=num_rows)
        found += len(ids)
        if num_tokens is not None and found >= num_tokens:
            return counts
        progress(min(1.0, found / num_tokens) if num_tokens else 0.5, f"{found:,} tokens counted")
    if num_tokens is not None:
        raise PruningError(
            f"the text has {found} tokens, fewer than num_tokens {num_tokens}: lower it, set it to null to count all "
            "of them, or name a larger data set"
        )
    if not found:
        raise PruningError("the text has no tokens to count: name another data set")
    return counts
