"""Which rows of an embedding stay when a share of them is to go: what a corpus can best do without.

A token that goes is written with its spelling from then on, which the corpus has so often more. What costs the fewest
further tokens goes first, one by one, and never a token that one which stays is made of. No torch here.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pruning.errors import PruningError
from pruning.vocabulary.spelling import Spelling


@dataclass(frozen=True)
class Selection:
    """kept: rows that stay, in order. added_tokens: by how many tokens the corpus gets longer, at most: pieces may join
    what stands beside them."""

    kept: tuple[int, ...]
    added_tokens: int


def rows_after(sparsity: float, num_rows: int, multiple: int, num_required: int) -> int:
    """How many rows stay: the multiple that comes nearest to the sparsity.

    num_required: rows that must. Raises PruningError if it is all of them, or fewer than must stay.
    """
    after = multiple * round((1 - sparsity) * num_rows / multiple)
    if after >= num_rows:
        raise PruningError(
            f"sparsity {sparsity:g} of a vocabulary of {num_rows} is less than half of the multiple of {multiple} that "
            "it is cut to: ask for more, or lower multiple"
        )
    if after < num_required:
        most = 1 - multiple * math.ceil(num_required / multiple) / num_rows
        raise PruningError(
            f"sparsity {sparsity:g} would leave {after} of a vocabulary of {num_rows}, of which {num_required} must "
            "stay (special and added tokens, bytes, characters, white space): ask for at most "
            f"{max(0.0, most):.3f}, or lower multiple"
        )
    return after


def with_parts(required: Collection[int], spellings: Mapping[int, Spelling]) -> frozenset[int]:
    """Tokens that must stay, with all that they are made of."""
    found: set[int] = set()
    left = list(required)
    while left:
        token = left.pop()
        if token not in found:
            found.add(token)
            spelling = spellings.get(token)
            left += spelling.pieces if spelling is not None and spelling.merged else ()
    return frozenset(found)


def select_rows(
    counts: Sequence[int],
    spellings: Mapping[int, Spelling],
    required: Collection[int],
    tokens: Collection[int],
    after: int,
) -> Selection:
    """The `after` rows that stay.

    counts: by row, how often the corpus has that token. required: tokens that stay whatever the counts, with their
    parts. tokens: the rows that are of a token; others (a padded embedding) go first. Of equally rare tokens the last
    one goes first: a BPE finds the frequent ones early.
    """
    excess = len(counts) - after
    padding = [row for row in reversed(range(len(counts))) if row not in tokens and row not in required]
    gone = set(padding[:excess])
    free = {token for token in tokens if token in spellings} - set(required)
    added = _Removal(counts, spellings, free).remove_(gone, excess - len(gone))
    return Selection(tuple(row for row in range(len(counts)) if row not in gone), added)


class _Removal:
    """Tokens going one by one. free: those that may go."""

    def __init__(self, counts: Sequence[int], spellings: Mapping[int, Spelling], free: Collection[int]) -> None:
        self._counts, self._spellings, self._free = list(counts), spellings, free
        # of how many tokens that are there this one is a part
        self._wholes = Counter(part for spelling in spellings.values() for part in _parts(spelling))

    def remove_(self, gone: set[int], number: int) -> int:
        """Add so many tokens to `gone`; returns how many further tokens the corpus then has."""
        queue = [self._entry(token) for token in self._free if not self._wholes[token]]
        heapq.heapify(queue)
        added = 0
        for _ in range(number):
            token = self._next(queue)
            gone.add(token)
            added += self._spell_(token, gone)
            for part in _parts(self._spellings[token]):
                self._wholes[part] -= 1
                if not self._wholes[part] and part in self._free:
                    heapq.heappush(queue, self._entry(part))
        return added

    def _next(self, queue: list[tuple[int, int]]) -> int:
        while True:
            assert queue, "of tokens that may go there is always one that is no part of another"
            count, last = heapq.heappop(queue)
            if count == self._counts[-last]:
                return -last
            heapq.heappush(queue, self._entry(-last))  # it stands for what has gone, too

    def _entry(self, token: int) -> tuple[int, int]:
        return self._counts[token], -token

    def _spell_(self, token: int, gone: Collection[int]) -> int:
        """Count the pieces of a token that has gone in its place, and theirs where they have gone too."""
        number, added, left = self._counts[token], 0, [token]
        while left:
            piece = left.pop()
            if piece in gone:
                pieces = self._spellings[piece].pieces
                added += number * (len(pieces) - 1)
                left += pieces
            else:
                self._counts[piece] += number
        return added


def _parts(spelling: Spelling) -> set[int]:
    return set(spelling.pieces) if spelling.merged else set()
