"""Means and variances are those of all tokens at once, whatever batches they came in."""

from __future__ import annotations

import pytest
import torch

from pruning.errors import PruningError
from pruning.statistics.cross import CrossMomentsAccumulator
from pruning.statistics.moments import MomentsAccumulator

CPU = torch.device("cpu")


def uneven_batches(mean: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, 5, generator=generator) * 3 + mean for shape in ((2, 7), (1, 3), (4, 11), (1, 1))]


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_equal_to_torch_over_all_tokens(mean: float) -> None:
    accumulator = MomentsAccumulator(5, CPU)
    batches = uneven_batches(mean)
    for batch in batches:
        accumulator.add(batch)
    moments = accumulator.finish("down_proj")
    X_TI = torch.cat([batch.flatten(0, -2) for batch in batches]).double()
    assert moments.num_tokens == len(X_TI)
    torch.testing.assert_close(moments.mean_I.double(), X_TI.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.variance_I.double(), X_TI.var(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.square_I.double(), X_TI.square().mean(0), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_measured_is_refused() -> None:
    accumulator = MomentsAccumulator(2, CPU)
    accumulator.add(torch.ones(1, 2))
    with pytest.raises(PruningError, match=r"variance of o_proj needs two tokens and there are 1; raise num_samples"):
        accumulator.finish("o_proj")
    accumulator = MomentsAccumulator(2, CPU)
    accumulator.add(torch.tensor([[1.0, float("inf")], [1.0, 2.0]]))
    with pytest.raises(PruningError, match=r"variance of o_proj \(2 tokens\) is not finite"):
        accumulator.finish("o_proj")


def test_a_fit_from_moments_is_the_least_squares_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    X_TI, W_OI = torch.randn(200, 6, generator=generator), torch.randn(4, 6, generator=generator)
    Y_TO = X_TI @ W_OI.T + 0.1 * torch.randn(200, 4, generator=generator)
    accumulator = CrossMomentsAccumulator(6, 4, CPU)
    for part in range(0, 200, 64):
        accumulator.add(X_TI[part : part + 64], Y_TO[part : part + 64])
    from pruning.distributed import ProcessGroup

    moments = accumulator.finish(ProcessGroup())
    assert moments is not None
    prior_OI = torch.randn(4, 6, generator=generator)
    expected_OI = torch.linalg.lstsq(X_TI.double(), Y_TO.double()).solution.T
    torch.testing.assert_close(moments.fit(prior_OI, 1e-9), expected_OI, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.fit(prior_OI, 1e9), prior_OI.double(), rtol=1e-4, atol=1e-4)
    direct = (Y_TO - X_TI @ prior_OI.T).double().square().sum(1).mean()
    assert moments.error(prior_OI) == pytest.approx(float(direct), rel=1e-4)
    nothing = CrossMomentsAccumulator(6, 4, CPU)
    assert nothing.finish(ProcessGroup()) is None
