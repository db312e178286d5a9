"""The layer walk computes what the model's own forward computes, shows every linear once and leaves no trace."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.divergence import final_stream
from pruning.errors import PruningError
from pruning.families import family_of, shapes
from pruning.sequential import SubLayer, WalkOptions, walk_layers
from pruning.surgery import shrink_
from tests.pruning.captured import CPU, hooked_moments, logits, outputs
from tests.tiny import FAMILIES, random_ids, random_plan, tiny_model

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "mistral-sliding": ("mistral", {"sliding_window": 5}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3-sliding": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "llama-eager": ("llama", {"attn_implementation": "eager"}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-scaled-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
}


def variant(name: str) -> PreTrainedModel:
    family, config = VARIANTS[name]
    return tiny_model(family, **config)


def walked(model: PreTrainedModel, ids_NL: Tensor, options: WalkOptions = CPU, num_heldout: int = 0) -> list[SubLayer]:
    return list(walk_layers(model, family_of(model), ids_NL, options, num_heldout=num_heldout))


def options(**changes: Any) -> WalkOptions:
    return WalkOptions(**({"device": torch.device("cpu"), "batch_size": 3} | changes))


@torch.no_grad()
def logits_of_stream(model: PreTrainedModel, stream_NLC: Tensor) -> Tensor:
    family = family_of(model)
    return family.head(model)(family.final_norm(model)(stream_NLC))


@pytest.mark.parametrize("name", VARIANTS)
def test_stream_after_the_walk_is_the_models(name: str) -> None:
    model = variant(name)
    ids_NL = random_ids(model, 5, 16)
    stream_NLC = final_stream(model, family_of(model), ids_NL, CPU)
    torch.testing.assert_close(logits_of_stream(model, stream_NLC), logits(model, ids_NL), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_hessians_are_those_of_the_linears_inputs_in_the_models_forward(name: str) -> None:
    model = variant(name)
    ids_NL = random_ids(model, 5, 16)
    expected = hooked_moments(model, ids_NL)
    sub_layers = walked(model, ids_NL)
    assert [sub.name for sub in sub_layers] == list(expected)
    for sub_layer in sub_layers:
        assert sub_layer.hessian.num_tokens == 80
        moments_II = expected[sub_layer.name]
        scale = float(moments_II.abs().max())
        torch.testing.assert_close(sub_layer.hessian.matrix_II.double(), moments_II, atol=2e-6 * scale, rtol=1e-4)


def test_sub_layers_come_in_order_under_their_dotted_names() -> None:
    model = tiny_model("llama")
    sub_layers = walked(model, random_ids(model))
    assert [(sub.layer, sub.kind) for sub in sub_layers] == [(i, k) for i in range(3) for k in ("attention", "mlp")]
    for sub_layer in sub_layers:
        assert model.get_submodule(sub_layer.name) is sub_layer.linear
        assert sub_layer.heldout is None


def test_an_uneven_model_with_an_empty_mlp() -> None:
    model = tiny_model("llama", layers=4)
    plan = random_plan(shapes(model), 4, seed=3)
    empty = plan.layers[1].model_copy(update={"kept_channels": ()})
    shrink_(model, plan.model_copy(update={"layers": (plan.layers[0], empty, *plan.layers[2:])}))
    ids_NL = random_ids(model, 5, 16)
    stream_NLC = final_stream(model, family_of(model), ids_NL, CPU)
    torch.testing.assert_close(logits_of_stream(model, stream_NLC), logits(model, ids_NL), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3-sliding"])
@pytest.mark.parametrize(
    "other", [{"batch_size": 1}, {"batch_size": 100}, {"activation_budget_bytes": 0}, {"activation_budget_bytes": 4000}]
)
def test_batch_size_and_activation_budget_change_nothing(name: str, other: dict[str, int]) -> None:
    model = variant(name)
    ids_NL = random_ids(model, 7, 16)
    for one, two in zip(
        walked(model, ids_NL, num_heldout=2), walked(model, ids_NL, options(**other), num_heldout=2), strict=True
    ):
        torch.testing.assert_close(one.hessian.matrix_II, two.hessian.matrix_II, atol=1e-5, rtol=1e-4)
        assert one.heldout is not None
        assert two.heldout is not None
        torch.testing.assert_close(one.heldout.matrix_II, two.heldout.matrix_II, atol=1e-5, rtol=1e-4)
    family = family_of(model)
    one_NLC, two_NLC = (final_stream(model, family, ids_NL, o) for o in (CPU, options(**other)))
    torch.testing.assert_close(one_NLC, two_NLC, atol=1e-5, rtol=1e-5)


def test_heldout_samples_enter_no_hessian() -> None:
    model = tiny_model("llama")
    ids_NL = random_ids(model, 6, 16)
    alone = walked(model, ids_NL[:4])
    expected_heldout = hooked_moments(model, ids_NL[4:])
    for sub_layer, without in zip(walked(model, ids_NL, num_heldout=2), alone, strict=True):
        torch.testing.assert_close(sub_layer.hessian.matrix_II, without.hessian.matrix_II, atol=1e-6, rtol=1e-5)
        assert sub_layer.hessian.num_tokens == 64
        assert sub_layer.heldout is not None
        assert sub_layer.heldout.num_tokens == 32
        torch.testing.assert_close(
            sub_layer.heldout.matrix_II.double(), expected_heldout[sub_layer.name], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", FAMILIES)
def test_later_hessians_are_those_of_the_changed_model(name: str, budget: int | None) -> None:
    model = tiny_model(name)
    ids_NL = random_ids(model, 5, 16)
    dense = hooked_moments(model, ids_NL)
    seen: dict[str, Tensor] = {}
    walk = walk_layers(model, family_of(model), ids_NL, options(activation_budget_bytes=budget))
    for sub_layer in walk:
        seen[sub_layer.name] = sub_layer.hessian.matrix_II.double()
        with torch.no_grad():
            sub_layer.linear.weight[:, ::3] = 0
    changed = hooked_moments(model, ids_NL)
    names = list(changed)
    for number, moment_name in enumerate(names):
        scale = float(changed[moment_name].abs().max())
        torch.testing.assert_close(seen[moment_name], changed[moment_name], atol=2e-6 * scale, rtol=1e-4)
        if number:  # only the first linear has its inputs before any change
            assert not torch.allclose(dense[moment_name], changed[moment_name], rtol=1e-2)


class Calls:
    """Counts forwards by module name, and the samples that went through."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.forwards: Counter[str] = Counter()
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def count(_module: nn.Module, _args: Any) -> None:
            self.forwards[name] += 1

        return count


@pytest.mark.parametrize(("budget", "per_batch"), [(None, 1), (0, 2)])
def test_every_sub_layer_runs_once_per_batch_when_inputs_are_kept(budget: int | None, per_batch: int) -> None:
    model = tiny_model("llama")
    blocks = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp", "self_attn.q_proj")]
    linears = list(outputs(model))
    calls = Calls(model, blocks + linears + ["model.layers.0", "lm_head"])
    walked(model, random_ids(model, 7, 8), options(batch_size=2, activation_budget_bytes=budget), num_heldout=2)
    batches = 3 + 1  # five samples and two held out, two at a time
    assert calls.forwards == Counter(dict.fromkeys(blocks, per_batch * batches) | dict.fromkeys(linears, batches))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stop_after", [None, 1, 4])
def test_the_model_is_left_as_it_was(training: bool, stop_after: int | None) -> None:
    model = tiny_model("qwen2", attention_dropout=0.5).train(training)
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    walk = walk_layers(model, family_of(model), random_ids(model), CPU)
    for number, _ in enumerate(walk, start=1):
        assert not model.training  # dropout would be calibration noise
        if number == stop_after:
            break
    walk.close()
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_failing_layer_leaves_its_linear_in_place() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    modules = dict(model.named_modules())
    with pytest.raises(PruningError, match=r"model\.layers\.1\.self_attn\.o_proj .* is not finite"):
        walked(model, random_ids(model))
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("stop_after", [None, 1, 2])
def test_a_layer_goes_back_to_its_device_however_the_walk_ends(
    stop_after: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # there is one device here, so the moves are counted, not seen
    model = tiny_model("llama", layers=1)
    moves: list[Any] = []
    layer = model.model.layers[0]
    original = layer.to
    monkeypatch.setattr(layer, "to", lambda device: (moves.append(device), original(device))[1])
    walk = walk_layers(model, family_of(model), random_ids(model), CPU)
    for number, _ in enumerate(walk, start=1):
        if number == stop_after:
            break
    walk.close()
    assert len(moves) == 2


def test_walking_needs_no_gradients_and_leaves_none() -> None:
    model = tiny_model("llama")
    stream_NLC = final_stream(model, family_of(model), random_ids(model), CPU)
    assert torch.is_grad_enabled()
    assert not stream_NLC.requires_grad
    for sub_layer in walk_layers(model, family_of(model), random_ids(model), CPU):
        assert torch.is_grad_enabled()  # the walk's no_grad is its own, not its caller's
        assert not sub_layer.hessian.matrix_II.requires_grad


def test_bfloat16_model() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    ids_NL = random_ids(model, 5, 16)
    expected = hooked_moments(model, ids_NL)
    for sub_layer in walked(model, ids_NL):
        assert sub_layer.hessian.matrix_II.dtype == torch.float32
        scale = float(expected[sub_layer.name].abs().max())
        torch.testing.assert_close(
            sub_layer.hessian.matrix_II.double(), expected[sub_layer.name], atol=0.02 * scale, rtol=0.05
        )
