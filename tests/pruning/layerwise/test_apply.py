"""Orders carried out: the first groups go, what the repair promises holds, and the sparsity counts what it adds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import registry
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of
from pruning.layerwise.capture import capture_statistics
from pruning.methods import flap, magnitude, wanda_sp
from pruning.orders import Orders
from tests.pruning.captured import CPU, hooked_moments, logits, outputs, prune_copy, recorded_inputs, windows
from tests.tiny import FAMILIES, random_ids, tiny_model


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_one_order_serves_every_sparsity(unit: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", heads=12, kv_heads=3, hidden=48)
    decoder, calibration = ResidentDecoder(model), windows(model)
    magnitude.order(decoder, magnitude.OrderConfig(), tmp_path, calibration=calibration, options=CPU)
    orders, before = Orders(tmp_path), None
    for sparsity in (0.2, 0.4):
        config = magnitude.Config(sparsity=sparsity, head_unit=unit)
        _, pruned = prune_copy(model, config, method=magnitude)
        for kept in pruned.plan.layers:
            order = orders.load(f"model.layers.{kept.layer}.mlp.down_proj", "channel").order
            assert set(kept.kept_channels) == set(order[48 - len(kept.kept_channels) :])
        if before is not None:
            for one, other in zip(pruned.plan.layers, before.layers, strict=True):
                assert set(one.kept_channels) <= set(other.kept_channels)
                assert set(one.kept_query_heads) <= set(other.kept_query_heads)
        before = pruned.plan


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_gives_what_the_removed_inputs_gave_on_average(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    masked, pruned = prune_copy(dense, flap.Config(sparsity=0.3), method=flap)
    with torch.no_grad(), recorded_inputs(dense) as seen:
        dense(windows(dense).input_ids_NL)
    for name, (X_TI,) in seen.items():
        one, other = outputs(dense)[name], outputs(masked)[name]
        mean_dense = X_TI.float().mean(0) @ one.weight.T + (0 if one.bias is None else one.bias)
        assert other.bias is not None
        # on the dense model's inputs; the pruned layers before give others
        kept = other.weight.any(0)
        assert torch.equal(other.weight[:, kept], one.weight[:, kept])
        torch.testing.assert_close(X_TI.float().mean(0) @ other.weight.T + other.bias, mean_dense, atol=1e-4, rtol=1e-4)
    assert pruned.plan.output_bias == (family not in ("phi", "phi-mha", "opt"))
    small = copy.deepcopy(masked)
    shrink_(small, pruned.plan)
    assert pruned.achieved_sparsity == pytest.approx(1 - decoder_parameters(small) / decoder_parameters(dense))
    save_checkpoint(small, None, tmp_path, pruned.plan)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(logits(loaded, random_ids(loaded)), logits(small, random_ids(small)))
    assert bool(getattr(loaded.config, "output_bias", False)) == pruned.plan.output_bias
    # what is pruned has biases from then on: to prune it again adds none
    again, twice = prune_copy(small, flap.Config(sparsity=0.2), method=flap)
    assert not twice.plan.output_bias
    shrink_(again, twice.plan)
    assert getattr(again.config, "output_bias", False) == pruned.plan.output_bias


def test_least_squares_refits_what_stays(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    capture_statistics(ResidentDecoder(dense), windows(dense), tmp_path, CPU)
    plain, before = prune_copy(dense, wanda_sp.Config(sparsity=0.3), method=wanda_sp)
    config = wanda_sp.Config(sparsity=0.3, repair="least_squares", dampening_frac=1e-6)
    refitted, pruned = prune_copy(dense, config, method=wanda_sp, statistics=tmp_path)
    assert pruned.plan == before.plan
    moments = hooked_moments(dense, windows(dense).input_ids_NL)
    for name, linear in outputs(refitted).items():
        W_OI, H_II = outputs(dense)[name].weight.detach().double(), moments[name]
        kept = linear.weight.any(0).nonzero().squeeze(1)
        expected = W_OI @ H_II[:, kept] @ torch.linalg.inv(H_II[kept][:, kept])
        torch.testing.assert_close(linear.weight.detach().double()[:, kept], expected, atol=2e-3, rtol=2e-2)

        def error(other: torch.Tensor, W_OI: torch.Tensor = W_OI, H_II: torch.Tensor = H_II) -> float:
            difference = W_OI - other.detach().double()
            return float(((difference @ H_II) * difference).sum())

        assert error(linear.weight) <= error(outputs(plain)[name].weight) * (1 + 1e-6)
    assert all(report.score is None or report.measured_error for report in pruned.layers)


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("random", {"sparsity": 0.9, "split": "attention"}, r"sparsity 0\.9 cannot be reached"),
        ("magnitude", {"sparsity": 0.2, "protect_first": 2, "protect_last": 2}, r"at most 0\.000 of the decoder-layer"),
        ("llm_pruner", {"sparsity": 0.2}, r"sparsity 0\.2 cannot be reached"),
        ("flap", {"sparsity": 0.99}, r"sparsity 0\.99 cannot be reached"),
        ("wanda_sp", {"sparsity": 0.2, "repair": "least_squares"}, "needs the folder that capture_statistics wrote"),
        ("shortened", {"sparsity": 0.95}, r"sparsity 0\.95 cannot be reached by dropping layers: 2 layers may go"),
        ("shortened", {"sparsity": 0.1}, r"less than half of the smallest of the layers, which is 0\.333"),
        ("shortened", {"layers": 3}, r"layers 3: of this model's 3 layers at most 2 layers may go"),
        (
            "shortened",
            {"layers": 1, "protect_first": 4},
            r"at most 0 layers may go \(protect_first 4, protect_last 0",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    method: str, config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.load("pruning.methods", method, "method")
    monkeypatch.setattr(ResidentDecoder, "layer", lambda *_: pytest.fail("a layer was read"))
    with pytest.raises(PruningError, match=message):
        prune_copy(tiny_model("llama"), module.Config(**config), method=module)


def test_heads_alone_of_a_model_without_groups_are_no_query_heads() -> None:
    with pytest.raises(PruningError, match="use kv_group, which there means single heads"):
        prune_copy(tiny_model("opt"), magnitude.Config(sparsity=0.2, head_unit="query_head"), method=magnitude)


def test_families_know_their_output_linears() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        assert len(outputs(model)) == 2 * len(family_of(model).layers(model))
