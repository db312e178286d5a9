"""The ratio of two times from pairs taken turn and turn about on a machine that does other things too.

What other processes take is added to one side of a pair or to the other, at times ten times over: means follow such
outliers, and the median wastes much of what the pairs say. The interquartile mean of the logarithms does neither, and
is the same (with the sign turned) whichever model is called the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.profile.report import Ratio

Floats = NDArray[np.float64]

MIN_PAIRS = 8
"""Fewer of them say nothing about their own spread."""

_RESAMPLES = 400


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """The second time over the first, from (reference, own) pairs of any one unit. The same pairs give the same
    answer."""
    logs_N = np.log(np.asarray(pairs, dtype=np.float64))
    logs_N = logs_N[:, 1] - logs_N[:, 0]
    value = math.exp(float(_middle_mean(logs_N)))
    if len(logs_N) < MIN_PAIRS:
        return Ratio(value=value, stderr=None, low=None, high=None, num_pairs=len(logs_N))
    drawn_RN = np.random.default_rng(0).integers(len(logs_N), size=(_RESAMPLES, len(logs_N)))
    means_R = _middle_mean(logs_N[drawn_RN])
    low, high = np.exp(np.quantile(means_R, (0.025, 0.975)))
    stderr = value * float(np.std(means_R, ddof=1))
    return Ratio(value=value, stderr=stderr, low=float(low), high=float(high), num_pairs=len(logs_N))


def _middle_mean(values_N: Floats) -> Floats:
    """Mean of the middle half along the last axis."""
    count = values_N.shape[-1]
    cut = count // 4
    return np.asarray(np.sort(values_N, axis=-1)[..., cut : count - cut].mean(-1))
