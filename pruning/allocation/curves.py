"""How pruning ratios run over depth: the paper's Incremental Pruning Ratio (SlimGPT, section 3.4)."""

from __future__ import annotations

import math
from typing import Literal

from pruning.errors import PruningError

Curve = Literal["log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease"]

#: no sub-layer loses more than this share of its heads or channels
MAX_RATIO = 0.95
#: end points of the paper at 20 %: r_0 = 0.0625, r_31 = 0.25; the same proportion is kept at other sparsities
START_OVER_END = 0.25


def curve_weights(curve: Curve, num_layers: int, start_over_end: float = START_OVER_END) -> tuple[float, ...]:
    """Relative pruning ratio of each layer, 1 at the most pruned end; first layer first.

    log_increase: r_i = r_0 + (r_{n-1} - r_0) log(i + 1) / log(n), with i from 0; linear likewise with i / (n - 1).
    """
    if num_layers == 1 or curve == "uniform":
        return (1.0,) * num_layers
    rising = [start_over_end + (1 - start_over_end) * share for share in _shares(curve, num_layers)]
    return tuple(rising if curve.endswith("increase") else reversed(rising))


def curve_ratios(curve: Curve, num_layers: int, end_points: tuple[float, float]) -> tuple[float, ...]:
    """Pruning ratio of each layer between given ratios of the first and of the last one (section 3.4).

    A decreasing curve is the increasing one seen from the other end. Raises PruningError for ratios outside
    [0, MAX_RATIO] or a curve that does not lead from the first to the last.
    """
    first, last = end_points
    if not (0 <= first <= MAX_RATIO and 0 <= last <= MAX_RATIO):
        raise PruningError(f"end_points {end_points} are not ratios between 0 and {MAX_RATIO}; give two such ratios")
    if num_layers == 1 or curve == "uniform":
        if first != last:
            where = "a uniform curve" if num_layers > 1 else "a model of one layer"
            raise PruningError(f"end_points {end_points} differ, but {where} has one ratio; give it twice")
        return (first,) * num_layers
    rises = curve.endswith("increase")
    if first > last if rises else first < last:
        other = curve.replace("increase", "decrease") if rises else curve.replace("decrease", "increase")
        raise PruningError(f"curve {curve} does not lead from {first} to {last}; swap the end_points or take {other}")
    low, high = min(end_points), max(end_points)
    rising = [low + (high - low) * share for share in _shares(curve, num_layers)]
    return tuple(rising if rises else reversed(rising))


def _shares(curve: Curve, num_layers: int) -> list[float]:
    """How far a rising curve has come at each layer: 0 at the first, 1 at the last; two layers at least."""
    if curve.startswith("log"):
        return [math.log(i + 1) / math.log(num_layers) for i in range(num_layers)]
    return [i / (num_layers - 1) for i in range(num_layers)]
