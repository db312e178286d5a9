"""How many groups go in each round of an elimination."""

from __future__ import annotations

from collections.abc import Iterator


def halving_group_sizes(count: int, *, largest: int = 1024, smallest: int = 8) -> Iterator[int]:
    """Dynamic group size (DGS, section 3.2): half of what is still to go, between `smallest` and `largest`."""
    while count > 0:
        size = min(count, max(smallest, min(largest, count // 2)))
        yield size
        count -= size


def nested_group_sizes(count: int, total: int, *, largest: int = 1024, smallest: int = 8) -> Iterator[int]:
    """Dynamic group size without a target: a sixteenth of what is left of `total`, until `count` have gone.

    The order that comes of it holds for every number of removals: one pass serves all sparsities.
    """
    gone = 0
    while gone < count:
        size = min(count - gone, max(smallest, min(largest, (total - gone) // 16)))
        yield size
        gone += size


def fixed_group_sizes(count: int, size: int) -> Iterator[int]:
    """Groups of `size` (the last one smaller) until `count` have gone: one head a round, or the "-DGS" ablation."""
    while count > 0:
        yield min(count, size)
        count -= size
