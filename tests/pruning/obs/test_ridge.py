"""The share of the diagonal that held-out tokens choose: against every share tried by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pruning.obs.elimination import dampen, output_error, refit
from pruning.obs.ridge import SHARES, refit_by_heldout
from pruning.statistics.hessian import Hessian, HessianAccumulator
from tests.pruning.captured import prepared

KEPT = torch.tensor([0, 1, 3, 4, 6, 7, 9, 10])


def inputs(num_tokens: int, seed: int, spread: float) -> Tensor:
    """Correlated inputs, of sizes that differ by orders of magnitude; the second is dead."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    X_TI = torch.randn(num_tokens, 12, generator=generator) @ mixing_II + spread * torch.randn(
        num_tokens, 12, generator=generator
    )
    X_TI *= torch.logspace(-2, 2, 12)
    X_TI[:, 1] = 0
    return X_TI


def moments(X_TI: Tensor) -> Hessian:
    accumulator = HessianAccumulator(X_TI.shape[1], X_TI.device)
    accumulator.add(X_TI)
    return accumulator.finish("linear")


@pytest.mark.parametrize("scale_O", [None, torch.tensor([1.0, 0.1, 3.0, 0.0, 2.0])])
@pytest.mark.parametrize("num_tokens", [13, 20, 400])
def test_no_share_errs_less_on_the_heldout_tokens(num_tokens: int, scale_O: Tensor | None) -> None:
    W_OI = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)) / torch.logspace(-2, 2, 12)
    hessian, heldout = moments(inputs(num_tokens, 1, 2.0)), moments(inputs(60, 2, 2.0))

    def system(share: float):  # type: ignore[no-untyped-def]
        return dampen("linear", W_OI, hessian, dampening_frac=share, own_share=True, scale_O=scale_O)

    def error(weight_OK: Tensor) -> float:
        pruned_OI = torch.zeros(5, 12, dtype=torch.float64)
        pruned_OI[:, KEPT] = weight_OK
        first = system(0.01)
        return output_error(first.counted(first.W_OI), first.counted(pruned_OI), heldout.matrix_II.double())

    weight_OK, share = refit_by_heldout(system(0.01), hessian, heldout, KEPT)
    torch.testing.assert_close(weight_OK, refit(system(share), KEPT))
    tried = {share: error(refit(system(share), KEPT)) for share in SHARES}
    place = SHARES.index(share)
    assert error(weight_OK) == pytest.approx(tried[share])
    assert error(weight_OK) <= min(list(tried.values())[: place + 2]) * (1 + 1e-4)
    if num_tokens == 13:
        assert share > SHARES[0], "few tokens fit noise"


def test_a_share_of_each_input_does_not_depend_on_their_sizes() -> None:
    """The weights as well as what they cost: inputs in other units are the same inputs."""
    X_TI, W_OI, units_I = inputs(50, 1, 1.0), torch.randn(5, 12), torch.logspace(3, -3, 12)
    plain = dampen("linear", W_OI, moments(X_TI), dampening_frac=0.1, own_share=True)
    scaled = dampen("linear", W_OI / units_I, moments(X_TI * units_I), dampening_frac=0.1, own_share=True)
    torch.testing.assert_close(refit(scaled, KEPT) * units_I[KEPT], refit(plain, KEPT), rtol=1e-4, atol=1e-4)


def test_inputs_of_any_units_are_conditioned_alike() -> None:
    """The condition that decides whether an inverse can be trusted, which for a share of the mean it does depend on."""
    X_TI, W_OI, units_I = inputs(50, 1, 1.0)[:, 2:], torch.randn(5, 10), torch.logspace(4, -4, 10)
    plain, scaled = (
        prepared("linear", W_OI, moments(each_TI), dampening_frac=0.1, own_share=True)
        for each_TI in (X_TI, X_TI * units_I)
    )
    assert scaled.rcond == pytest.approx(plain.rcond, rel=1e-3)
    assert scaled.rcond > 1e-4
