"""The held-out KL equals the KL of the full logits."""

from __future__ import annotations

import copy

import pytest
import torch

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.errors import PruningError
from pruning.families import family_of
from pruning.layerwise.kl import final_stream, mean_kl
from tests.pruning.captured import CPU, logits
from tests.tiny import FAMILIES, add_noise_, random_ids, tiny_model


@pytest.mark.parametrize(("name", "length"), [(name, 16) for name in FAMILIES] + [("llama", 300)])
def test_kl_is_that_of_the_models_logits(name: str, length: int) -> None:
    dense = tiny_model(name)
    other = copy.deepcopy(dense)
    add_noise_(family_of(other).layers(other), seed=5)
    ids_ML = random_ids(dense, 3, length)
    streams = [final_stream(ResidentDecoder(model), ids_ML, CPU) for model in (dense, other)]
    log_p, log_q = (logits(model, ids_ML).double().log_softmax(-1) for model in (dense, other))
    direct = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert direct > 0.01
    assert mean_kl(ResidentDecoder(dense), *streams, CPU) == pytest.approx(direct, rel=1e-4)


def test_kl_to_itself_is_zero() -> None:
    model = tiny_model("llama")
    stream_MLC = final_stream(ResidentDecoder(model), random_ids(model), CPU)
    assert mean_kl(ResidentDecoder(model), stream_MLC, stream_MLC.clone(), CPU) == pytest.approx(0.0, abs=1e-9)


def test_gradients_are_not_recorded() -> None:
    model = tiny_model("llama")
    stream_MLC = final_stream(ResidentDecoder(model), random_ids(model), CPU)
    mean_kl(ResidentDecoder(model), stream_MLC, stream_MLC, CPU)
    assert not stream_MLC.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_model_is_an_error_not_a_number(poison: float) -> None:
    model = tiny_model("llama")
    stream_MLC = final_stream(ResidentDecoder(model), random_ids(model), CPU)
    broken_MLC = stream_MLC.clone()
    broken_MLC[0, 3, 5] = poison
    with pytest.raises(PruningError, match=r"KL to the dense logits is not finite.*dtype"):
        mean_kl(ResidentDecoder(model), stream_MLC, broken_MLC, CPU)
