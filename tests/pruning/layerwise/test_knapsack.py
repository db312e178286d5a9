"""SlimGPT by knapsack: what is predicted is what is measured, the budget is met, and a kill changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.save_load import save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.families.forward import KINDS, output_linear, output_name
from pruning.gradients.sensitivity import walk_sensitivities
from pruning.layerwise import streaming
from pruning.layerwise.levels import Tracing, trace_levels
from pruning.methods.slimgpt import Config
from pruning.obs.elimination import dampen, refit
from pruning.obs.groups import Solver
from pruning.statistics.hessian import Hessian
from tests.pruning.captured import CPU, logits, prune_copy, recorded_inputs, windows
from tests.pruning.streamed import Counted, Stop, stream
from tests.tiny import random_ids, tiny_model


def config(sparsity: float = 0.3, **more: Any) -> Config:
    return Config(**({"sparsity": sparsity, "allocation": "knapsack", "steps": 2} | more))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_predicted_loss_is_that_of_a_quadratic(name: str) -> None:
    """Half the sum over outputs of squared gradient times squared error, of the columns refitted by brute force."""
    model = tiny_model(name)
    decoder, ids_NL = ResidentDecoder(model), random_ids(model, 16, 24)
    family = decoder.family
    solver = Solver(1e-6, True, None, "kv_group")
    tracing = Tracing(shapes(model), layer_cost(model), solver, "text", range(1, 3), lambda layer: KINDS)
    sites = trace_levels(decoder, ids_NL, tracing, CPU)
    assert set(sites) == {(layer, kind) for layer in (1, 2) for kind in KINDS}
    names = lambda layer, kind: output_name(family, layer, kind)  # noqa: E731
    gradients = {each.layer: each for each in walk_sensitivities(decoder, ids_NL, CPU, name_of=names)}
    with torch.no_grad(), recorded_inputs(model) as seen:
        model(ids_NL)
    for (layer, kind), site in sites.items():
        weight_OI = output_linear(family, family.layers(model)[layer], kind).weight.detach()
        (X_TI,) = seen[names(layer, kind)]
        hessian = Hessian((X_TI.T @ X_TI / len(X_TI)).float(), len(X_TI))
        gradient_O = gradients[layer].sub_layers[kind].gradient_C.double()
        width = 1 if kind == "mlp" else weight_OI.shape[1] // len(site.order)
        for parameters, predicted, count in zip(site.levels.parameters, site.levels.losses, site.counts, strict=True):
            gone = {group * width + column for group in site.order[:count] for column in range(width)}
            kept_K = torch.tensor(sorted(set(range(weight_OI.shape[1])) - gone), dtype=torch.int64)
            system = dampen("w", weight_OI, hessian, dampening_frac=1e-6)
            error_TO = X_TI @ weight_OI.double().T - X_TI[:, kept_K] @ refit(system, kept_K).T
            quadratic = 0.5 * float((error_TO.square().mean(0) * gradient_O).sum())
            assert predicted == pytest.approx(quadratic, rel=1e-2, abs=1e-9)
            assert site.groups(parameters) == count
        whole = 0.5 * float(((X_TI @ weight_OI.double().T).square().mean(0) * gradient_O).sum())
        assert site.levels.losses[-1] == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "olmo2", "gemma2"])
def test_the_budget_is_met_and_masked_equals_shrunk(name: str) -> None:
    dense = tiny_model(name)
    masked, pruned = prune_copy(dense, config(head_unit="kv_group"))
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    achieved = 1 - decoder_parameters(shrunk) / decoder_parameters(dense)
    assert pruned.achieved_sparsity == pytest.approx(achieved)
    assert abs(achieved - 0.3) <= 0.005
    torch.testing.assert_close(
        logits(shrunk, random_ids(dense)), logits(masked, random_ids(dense)), atol=2e-5, rtol=1e-5
    )
    assert [step.sparsity for step in pruned.steps] == pytest.approx([0.15, 0.3], abs=0.005)
    first, second = pruned.steps
    assert all(
        a <= b for a, b in zip(first.channels + first.head_units, second.channels + second.head_units, strict=True)
    )
    assert sum(second.channels) == sum(each.total - each.kept for each in pruned.layers if each.sub_layer == "mlp")
    assert all(step.forwards == 4 and step.predicted_loss > 0 for step in pruned.steps)
    assert 0 < first.heldout_kl < second.heldout_kl  # type: ignore[operator]
    assert any(report.sensitivity for report in pruned.layers)


def test_what_hardly_counts_goes_first_up_to_whole_sub_layers_and_layers() -> None:
    """Layer 1 adds next to nothing and goes as a whole; of the first layer's attention one unit stays all the same."""
    dense = tiny_model("llama")
    with torch.no_grad():
        for index, share in ((0, 1e-3), (1, 1e-4)):
            dense.model.layers[index].self_attn.o_proj.weight *= share
        dense.model.layers[1].mlp.down_proj.weight *= 1e-4
    _, pruned = prune_copy(dense, config(0.4))
    assert pruned.plan.dropped_layers == (1,)
    assert len(pruned.plan.layers[0].kept_query_heads) == 4  # of each of the kv heads
    assert pruned.steps[-1].head_units[1] == 2
    shrunk = copy.deepcopy(dense)
    shrink_(shrunk, pruned.plan)
    assert torch.isfinite(logits(shrunk, random_ids(dense))).all()


def test_widths_on_a_grid_and_layers_left_whole() -> None:
    dense = tiny_model("llama")
    _, pruned = prune_copy(dense, config(0.2, channel_multiple=8, protect_first=1))
    assert pruned.plan.layers[0].shape == shapes(dense)[0]
    assert all(layer.shape.intermediate_size % 8 == 0 for layer in pruned.plan.layers)
    _, few = prune_copy(dense, config(0.2, step_samples=3, ridge="heldout", labels="sampled", grouped_cholesky=False))
    assert abs(few.achieved_sparsity - 0.2) < 0.005
    assert any(report.ridge for report in few.layers)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"split": "ffn"},
            "split 'ffn' plays no part with allocation knapsack: leave it out, or set allocation to curve",
        ),
        ({"curve": "uniform"}, "curve 'uniform' plays no part"),
        ({"uniform": True}, "uniform True plays no part"),
        ({"propagate_error": False}, "propagate_error False plays no part"),
        ({"end_points": (0.1, 0.3)}, r"end_points \(0.1, 0.3\) plays no part"),
        ({"allocation": "curve"}, "steps 2 plays no part with allocation curve"),
        ({"steps": 0}, "greater than 0"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config(**options)


def test_what_cannot_be_reached_is_refused_before_any_work() -> None:
    model = tiny_model("llama")
    with pytest.raises(
        PruningError, match=r"sparsity 0\.5 cannot be reached: with these protected layers at most 0\.3"
    ):
        prune_copy(model, config(0.5, protect_first=2))
    with pytest.raises(PruningError, match=r"channel_multiple 64 is more than the narrowest FFN"):
        prune_copy(model, config(0.2, channel_multiple=64))
    with pytest.raises(PruningError, match="ridge 'heldout' is chosen by held-out"):
        prune_copy(model, config(ridge="heldout"), windows(model, num_heldout=0))


def test_streamed_and_killed_anywhere_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    save_checkpoint(model, None, tmp_path / "source")
    shares: list[float] = []
    whole, files = stream(tmp_path, "whole", config(0.4), lambda share, message: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    _, resident = prune_copy(model, config(0.4), windows(model))
    assert whole.plan == resident.plan
    assert whole.steps == resident.steps
    for at in (0.45, 0.95):  # in the refit of the first step, and in that of the last

        def stop(share: float, message: str, at: float = at) -> None:
            if share >= at:
                raise Stop

        with pytest.raises(Stop):
            stream(tmp_path, "killed", config(0.4), stop)
    monkeypatch.setattr(streaming, "StreamedDecoder", Counted)
    pruned, again = stream(tmp_path, "killed", config(0.4))
    assert pruned.steps == whole.steps
    assert pruned.plan == whole.plan
    assert again == files
    assert Counted.read <= 1 + 2 * len(family_of(model).layers(model))  # the last layers, and the dense held-out stream
