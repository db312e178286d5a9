"""Part `growth`: how the time grows with each size, the others being equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from pruning.methods import slimgpt
from tests.bench.materials import Materials
from tests.bench.options import Options, Shape, Windows
from tests.bench.random_tokens import random_calibration
from tests.bench.report import Figures, Result, protocol
from tests.bench.resident import prune
from tests.bench.synthetic import random_llama
from tests.bench.timing import forward_seconds

_PERCENT = 20


def run(materials: Materials, options: Options) -> Result:
    """Depth, width, tokens, sparsity: seconds and prune over forward at each point, and the slopes in log-log."""
    growth, figures = options.growth, Figures()
    base, tokens = growth.base, growth.tokens[0]
    axes: dict[str, list[tuple[int, Shape, Windows, int]]] = {
        "depth": [(layers, replace(base, layers=layers), tokens, _PERCENT) for layers in growth.depths],
        "width": [(width, Shape.of_width(width, base.layers), tokens, _PERCENT) for width in growth.widths],
        "tokens": [(seen.count * seen.length, base, seen, _PERCENT) for seen in growth.tokens],
        "sparsity": [(percent, base, tokens, percent) for percent in growth.percents],
    }
    for axis, points in axes.items():
        measured = [(size, *_measure(options, *point, f"{axis} {size}")) for size, *point in points]
        for size, forward, pruning in measured:
            figures[f"growth_{axis}_{size}_seconds"] = pruning
            figures[f"growth_{axis}_{size}_over_forward"] = pruning / forward
        sizes = [size for size, _, _ in measured]
        if axis == "sparsity":
            figures["growth_sparsity_last_over_first"] = measured[-1][2] / measured[0][2]
        else:
            figures[f"growth_{axis}_exponent"] = slope(sizes, [pruning for _, _, pruning in measured])
            figures[f"growth_{axis}_forward_exponent"] = slope(sizes, [forward for _, forward, _ in measured])
    how = protocol(
        options,
        f"random Llamas in memory, vocabulary {base.vocab}; unless it is the axis: {base.layers} layers, hidden "
        f"{base.hidden}, FFN 2.75 x hidden, {base.heads} heads, {tokens} random tokens, sparsity {_PERCENT} %",
        f"split equal; medians of {growth.repeats} turns of forward and prune",
        "exponent: least-squares slope of log seconds over log size",
    )
    return Result("growth", how, figures)


def slope(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Least-squares slope of log time over log size: 1 is linear growth, 2 quadratic."""
    xs, ys = [math.log(size) for size in sizes], [math.log(time) for time in times]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def _measure(options: Options, shape: Shape, tokens: Windows, percent: int, title: str) -> tuple[float, float]:
    """Median seconds of a forward and of a pruning, turn and turn about."""
    model, calibration = random_llama(shape), random_calibration(shape.vocab, tokens)
    config = slimgpt.Config(sparsity=percent / 100, split="equal")
    placed = model.to(options.device)
    forwards, prunings = [], []
    for turn in range(-1, options.growth.repeats):  # turn -1 warms up
        ids_NL, batch_size = calibration.input_ids_NL, options.batch_size
        forward = forward_seconds(placed, ids_NL, batch_size=batch_size, device=options.device)
        if turn >= 0:
            forwards.append(forward)
            prunings.append(prune(model, calibration, config, options, title).seconds)
    return median(forwards), median(prunings)
