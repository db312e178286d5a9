"""Counted work against what torch counts while the real code runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pruning.costs.work import DecoderSize, Rates, Windows, Work, as_float32, forward_work, moments_work, solver_work
from pruning.families import family_of, layer_cost, shapes
from pruning.methods import slimgpt
from pruning.obs.elimination import dampen, prepare, refit
from pruning.obs.groups import Groups, Solver, search
from pruning.obs.rounds import halving_group_sizes
from pruning.statistics.hessian import Hessian, HessianAccumulator
from tests.tiny import random_ids, tiny_model


def counting() -> FlopCounterMode:
    """Torch leaves out sums in place."""

    def in_place(into: Any, left: Sequence[int], right: Sequence[int], **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def size_of(family: str) -> DecoderSize:
    model = tiny_model(family)
    head_dim = family_of(model).head_dim(model)
    config = model.config
    return DecoderSize(shapes(model), layer_cost(model), head_dim, config.hidden_size, config.vocab_size, 4)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_a_forward_has_the_products_that_torch_counts(family: str) -> None:
    model, size = tiny_model(family), size_of(family)
    ids = random_ids(model, 2, 16)
    with torch.no_grad(), counting() as counter:
        family_of(model).decoder(model)(input_ids=ids, use_cache=False)
    # on the CPU torch does not count the attention itself: each token with half of its window, twice
    attention = sum(2.0 * size.inputs(shape)[0] * 16 * 32 for shape in size.shapes)
    ours = forward_work(size, Windows(32, 0, 16)).model_flops - attention
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05), "but for norms and biases"


@pytest.mark.parametrize("num_inputs", [100, 256, 768])
def test_moments_have_the_products_that_torch_counts(num_inputs: int) -> None:
    accumulator = HessianAccumulator(num_inputs, "cpu")
    with counting() as counter:
        accumulator.add(torch.randn(3, 10, num_inputs))
    assert moments_work(num_inputs, 30).float32_flops == counter.get_total_flops()


def test_the_solver_has_the_products_that_torch_counts() -> None:
    """Of inverse and triangular solutions torch counts nothing: the cubic terms are ours."""
    inputs, outputs, sizes = 256, 64, tuple(halving_group_sizes(96))
    X_TI = torch.randn(600, inputs)
    hessian, weight_OI = Hessian(X_TI.T @ X_TI / 600, 600), torch.randn(outputs, inputs)
    solver = Solver(0.01, grouped_cholesky=True, group_size=None, head_unit="kv_group")
    with counting() as counter:
        system = dampen("w", weight_OI, hessian, dampening_frac=0.01)
        search(prepare(system), Groups(torch.arange(inputs).unsqueeze(1), sizes), solver)
        refit(system, torch.arange(96, inputs))
    kept = inputs - 96
    left, uncounted = inputs, float(inputs**3) + kept**3 / 3 + 2 * outputs * kept**2
    for gone in sizes:
        left -= gone
        uncounted += gone * gone * (left + gone + outputs)
    counted = solver_work(inputs, outputs, sizes).float64_flops - uncounted
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_parts_of_slimgpt_follow_what_is_asked() -> None:
    size, windows = size_of("llama"), Windows(32 * 64, 4 * 64, 64)
    parts = slimgpt.work(slimgpt.Config(sparsity=0.3, split="equal", head_unit="kv_group"), size, windows)
    assert list(parts) == ["forward", "moments", "solve", "files"]
    assert parts["forward"] == forward_work(size, windows)
    twice = slimgpt.work(slimgpt.Config(sparsity=0.3, split="equal"), size, Windows(64 * 64, 8 * 64, 64))
    assert twice["moments"].float32_flops == 2 * parts["moments"].float32_flops
    assert twice["solve"] == parts["solve"], "it does not depend on how many tokens there were"
    ffn = slimgpt.work(slimgpt.Config(sparsity=0.2, split="ffn"), size, windows)
    assert 0 < ffn["moments"].float32_flops < parts["moments"].float32_flops, "attention loses nothing"
    assert "split" in slimgpt.work(slimgpt.Config(sparsity=0.3, split="auto"), size, windows)


def test_seconds_are_work_over_rates() -> None:
    rates = Rates(10.0, 20.0, 5.0, 2.0, 1.0)
    assert rates.seconds(Work(10.0, 20.0, 5.0, 2.0, 1.0)) == 5.0
    assert rates.seconds(as_float32(Work(float64_flops=20.0, memory_bytes=4.0))) == 2.0
    assert astuple(Work(1.0) + Work(2.0, disk_bytes=3.0)) == (3.0, 0.0, 0.0, 0.0, 3.0)
