"""Tests and intervals for paired scores, as plain numbers: McNemar's test, sign flips, the bootstrap.

* McNemar's test (1947) in its exact, binomial form: for answers that are right or wrong.
* Sign-flip permutation test, for any other score: under the null hypothesis an item's two scores could be exchanged.
  All 2^n flips where they are few; else drawn ones, the observed one counted among them (Phipson and Smyth, arXiv
  1603.05766). Where none of those drawn is as extreme, Hoeffding's bound on the exact p-value is given if it is
  smaller: corrections for many tests need p-values below 1 / resamples.
* Percentile bootstrap (Efron 1979) over items, all columns of an item drawn together.

Shapes: N items, R resamples, D distinct items, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000

_MOST_ENUMERATED = 13
"""All sign flips of so many items are fewer than RESAMPLES."""

_NUMBERS_AT_ONCE = 2**22
"""Numbers drawn at once: 32 MiB in 64 bits each."""

_WORTH_GROUPING = 8
"""Items per distinct item from which drawing how often each distinct one comes is faster than drawing the items."""


def mcnemar_p(num_lost: int, num_gained: int) -> float:
    """Two-sided p-value of flips that are so uneven, were each as likely one way as the other; correctly rounded.

    1 if nothing flipped.
    """
    flips, fewer = num_lost + num_gained, min(num_lost, num_gained)
    term, tail = 1, 1
    for count in range(1, fewer + 1):
        term = term * (flips - count + 1) // count
        tail += term
    return min(1.0, float(2 * tail / 2**flips))


def sign_flip_p(differences_N: Floats, generator: np.random.Generator, *, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of the sum of the differences, were each as likely to have the other sign.

    The order of the differences does not matter.
    """
    sizes_N = np.sort(np.abs(differences_N[differences_N != 0]))
    if len(sizes_N) == 0:
        return 1.0
    # sums of the same numbers in another order differ in their last bits, and must count as equal
    least = max(0.0, abs(math.fsum(differences_N)) - 1e-9 * math.fsum(sizes_N))
    if len(sizes_N) <= _MOST_ENUMERATED:
        flips_RN = np.arange(2 ** len(sizes_N))[:, None] >> np.arange(len(sizes_N)) & 1
        return float(np.mean(np.abs((2 * flips_RN - 1) @ sizes_N) >= least))
    extreme = sum(int(np.sum(np.abs(sums_R) >= least)) for sums_R in _flipped_sums(sizes_N, generator, resamples))
    drawn = (extreme + 1) / (resamples + 1)
    bound = 2 * math.exp(-(least**2) / (2 * float(sizes_N @ sizes_N)))
    return drawn if extreme else min(drawn, bound)


def resampled_means(
    scores_NC: Floats, weights_N: Floats, generator: np.random.Generator, *, resamples: int = RESAMPLES
) -> Floats:
    """Weighted means of every column in each bootstrap resample of the items, (R, C). Weights are resampled too.

    The order of the items does not matter.
    """
    rows_NC = np.column_stack([scores_NC * weights_N[:, None], weights_N])
    distinct_DC, counts_D = np.unique(rows_NC, axis=0, return_counts=True)
    grouped = len(distinct_DC) * _WORTH_GROUPING <= len(rows_NC)
    table_DC = distinct_DC if grouped else np.repeat(distinct_DC, counts_D, axis=0)
    parts = []
    for rows in _chunks(resamples, len(table_DC)):
        if grouped:
            drawn_RD = generator.multinomial(len(rows_NC), counts_D / len(rows_NC), size=rows)
        else:
            drawn_RD = _drawn(rows, len(rows_NC), generator)
        parts.append(drawn_RD @ table_DC)
    sums_RC = np.concatenate(parts)
    return np.asarray(sums_RC[:, :-1] / sums_RC[:, -1:], dtype=np.float64)


def _flipped_sums(sizes_N: Floats, generator: np.random.Generator, resamples: int) -> Iterator[Floats]:
    for rows in _chunks(resamples, len(sizes_N)):
        bits = np.unpackbits(generator.integers(256, size=(rows, -(-len(sizes_N) // 8)), dtype=np.uint8), axis=1)
        # of signs in {-1, 1}: twice the sum of those kept less the sum of all
        yield 2 * (bits[:, : len(sizes_N)].astype(np.float64) @ sizes_N) - math.fsum(sizes_N)


def _drawn(rows: int, items: int, generator: np.random.Generator) -> NDArray[Any]:
    """How often each of the items comes in each of the resamples."""
    drawn = generator.integers(items, size=(rows, items))
    drawn += np.arange(rows)[:, None] * items
    return np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items)


def _chunks(resamples: int, width: int) -> Iterator[int]:
    """Sizes that sum to the resamples, each of a bounded number of numbers."""
    most = max(1, _NUMBERS_AT_ONCE // max(1, width))
    for start in range(0, resamples, most):
        yield min(most, resamples - start)
