"""The accumulated second moments are the plain formula, in any number of batches and any float dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pruning.errors import PruningError
from pruning.statistics.hessian import HessianAccumulator


def tokens(num_tokens: int, num_inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_inputs, generator=generator) + 0.3


def moments(X_TI: Tensor) -> Tensor:
    return X_TI.double().T @ X_TI.double() / len(X_TI)


def accumulated(*batches: Tensor) -> Tensor:
    accumulator = HessianAccumulator(batches[0].shape[-1], device="cpu")
    for batch in batches:
        accumulator.add(batch)
    return accumulator.finish("layers.0.o_proj").matrix_II


@pytest.mark.parametrize("num_inputs", [1, 7, 255, 256, 257, 511, 512, 513, 1100])
def test_batches_equal_at_once_equal_formula(num_inputs: int) -> None:
    X_TI = tokens(200, num_inputs)
    at_once, from_batches = accumulated(X_TI), accumulated(*X_TI.split([1, 63, 136]))
    torch.testing.assert_close(at_once.double(), moments(X_TI), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(from_batches.double(), moments(X_TI), rtol=1e-5, atol=1e-6)
    assert at_once.dtype == torch.float32
    assert torch.equal(at_once, at_once.T)


def test_many_tokens_lose_no_digits_that_matter() -> None:
    X_TI = tokens(50_000, 24)
    torch.testing.assert_close(accumulated(*X_TI.split(1000)).double(), moments(X_TI), rtol=1e-5, atol=1e-6)


def test_every_leading_position_is_a_token() -> None:
    X_BLI = tokens(24, 5).reshape(2, 12, 5)
    accumulator = HessianAccumulator(5, device="cpu")
    accumulator.add(X_BLI)
    hessian = accumulator.finish("o_proj")
    assert hessian.num_tokens == 24
    torch.testing.assert_close(hessian.matrix_II.double(), moments(X_BLI.flatten(0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    X_TI = tokens(3000, 16).to(dtype)
    torch.testing.assert_close(accumulated(X_TI).double(), moments(X_TI), rtol=1e-5, atol=1e-6)


def test_inputs_stay_as_they_are() -> None:
    X_TI = tokens(20, 9)
    before = X_TI.clone()
    accumulated(X_TI)
    assert torch.equal(X_TI, before)


def test_finishing_makes_no_second_matrix() -> None:
    # of a 14336 wide down_proj each would take 0.8 GB
    accumulator = HessianAccumulator(600, device="cpu")
    accumulator.add(tokens(20, 600))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        accumulator.finish("down_proj")
    largest = max(event.self_cpu_memory_usage for event in profiled.key_averages() if event.count)
    assert largest < 600 * 600 * 4


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_names_the_linear_and_the_way_out(poison: float) -> None:
    X_TI = tokens(20, 9)
    X_TI[3, 4] = poison
    with pytest.raises(PruningError, match=r"layers\.0\.o_proj \(20 tokens\) is not finite.*dtype"):
        accumulated(X_TI)


def test_no_tokens() -> None:
    with pytest.raises(PruningError, match=r"model\.layers\.2\.mlp\.down_proj has seen no tokens; raise num_samples"):
        HessianAccumulator(4, device="cpu").finish("model.layers.2.mlp.down_proj")


def test_a_linear_without_inputs() -> None:
    # a plan may leave a layer no channels at all, and a later step walks that model
    accumulator = HessianAccumulator(0, device="cpu")
    accumulator.add(torch.zeros(2, 12, 0))
    hessian = accumulator.finish("down_proj")
    assert hessian.matrix_II.shape == (0, 0)
    assert hessian.num_tokens == 24
