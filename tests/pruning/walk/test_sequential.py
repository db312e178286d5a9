"""The layer walk computes what the model's own forward computes, shows every linear once and leaves no trace."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import family_of, shapes
from pruning.layerwise.kl import final_stream
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import walk_layers
from pruning.walk.sub_layer import SubLayer
from tests.pruning.captured import CPU, hooked_moments, in_bfloat16, logits, outputs, same_weights
from tests.tiny import FAMILIES, random_ids, random_plan, tiny_model

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "mistral-sliding": ("mistral", {"sliding_window": 5}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3-sliding": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "llama-eager": ("llama", {"attn_implementation": "eager"}),
    "phi-eager": ("phi", {"attn_implementation": "eager"}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-scaled-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gemma-one-kv-head": ("gemma", {"kv_heads": 1}),
}


def variant(name: str) -> PreTrainedModel:
    family, config = VARIANTS[name]
    return tiny_model(family, **config)


def walked(
    model: PreTrainedModel, ids_NL: Tensor, options: WalkOptions = CPU, num_heldout: int = 0, **more: Any
) -> list[SubLayer]:
    return list(walk_layers(ResidentDecoder(model), ids_NL, options, num_heldout=num_heldout, **more))


def moments_of(sub_layer: SubLayer) -> Tensor:
    assert sub_layer.hessian is not None
    return sub_layer.hessian.matrix_II.double()


def options(**changes: Any) -> WalkOptions:
    return WalkOptions(**({"device": torch.device("cpu"), "batch_size": 3} | changes))


def stream_of(model: PreTrainedModel, ids_NL: Tensor, how: WalkOptions = CPU) -> Tensor:
    return final_stream(ResidentDecoder(model), ids_NL, how)


@torch.no_grad()
def logits_of_stream(model: PreTrainedModel, stream_NLC: Tensor) -> Tensor:
    family = family_of(model)
    return family.head(model)(family.final_norm(model)(stream_NLC))


def assert_same_moments(actual_II: Tensor, expected_II: Tensor) -> None:
    scale = float(expected_II.abs().max())
    torch.testing.assert_close(actual_II, expected_II, atol=2e-6 * scale, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_stream_after_the_walk_is_the_models(name: str) -> None:
    model = variant(name)
    ids_NL = random_ids(model, 5, 16)
    stream_NLC = stream_of(model, ids_NL)
    torch.testing.assert_close(logits_of_stream(model, stream_NLC), logits(model, ids_NL), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_hessians_are_those_of_the_linears_inputs_in_the_models_forward(name: str) -> None:
    model = variant(name)
    ids_NL = random_ids(model, 5, 16)
    expected = hooked_moments(model, ids_NL)
    sub_layers = walked(model, ids_NL)
    assert [sub.name for sub in sub_layers] == list(expected)
    for sub_layer in sub_layers:
        assert sub_layer.hessian is not None
        assert sub_layer.hessian.num_tokens == 80
        assert_same_moments(moments_of(sub_layer), expected[sub_layer.name])


@pytest.mark.parametrize("name", FAMILIES)
def test_sub_layers_come_in_order_under_their_dotted_names(name: str) -> None:
    model = tiny_model(name)
    sub_layers = walked(model, random_ids(model))
    assert [(sub.layer, sub.kind) for sub in sub_layers] == [(i, k) for i in range(3) for k in ("attention", "mlp")]
    for sub_layer in sub_layers:
        own = model.get_submodule(sub_layer.name)
        assert torch.equal(own.weight, sub_layer.linear.weight)
        assert own.weight.data_ptr() != sub_layer.linear.weight.data_ptr(), "a copy, free to change"
        assert sub_layer.heldout is None


@pytest.mark.parametrize("name", FAMILIES)
def test_an_uneven_model_with_an_empty_mlp(name: str) -> None:
    model = tiny_model(name, layers=4)
    plan = random_plan(shapes(model), family_of(model).head_dim(model), seed=3)
    empty = plan.layers[1].model_copy(update={"kept_channels": ()})
    shrink_(model, plan.model_copy(update={"layers": (plan.layers[0], empty, *plan.layers[2:])}))
    ids_NL = random_ids(model, 5, 16)
    stream_NLC = stream_of(model, ids_NL)
    torch.testing.assert_close(logits_of_stream(model, stream_NLC), logits(model, ids_NL), atol=1e-5, rtol=1e-5)
    expected = hooked_moments(model, ids_NL)
    for sub_layer in walked(model, ids_NL):
        if expected[sub_layer.name].numel():
            assert_same_moments(moments_of(sub_layer), expected[sub_layer.name])


@pytest.mark.parametrize("name", ["llama", "qwen3-sliding", "phi"])
@pytest.mark.parametrize(
    "other",
    [{"batch_size": 1}, {"batch_size": 100}, {"activation_budget_bytes": 0}, {"activation_budget_bytes": 20000}],
)
def test_batch_size_and_activation_budget_change_nothing(name: str, other: dict[str, int]) -> None:
    model = variant(name)
    ids_NL = random_ids(model, 7, 16)
    for one, two in zip(
        walked(model, ids_NL, num_heldout=2), walked(model, ids_NL, options(**other), num_heldout=2), strict=True
    ):
        torch.testing.assert_close(moments_of(one), moments_of(two), atol=1e-5, rtol=1e-4)
        assert one.heldout is not None
        assert two.heldout is not None
        torch.testing.assert_close(one.heldout.matrix_II, two.heldout.matrix_II, atol=1e-5, rtol=1e-4)
        if "activation_budget_bytes" in other:  # files give back the very bits
            assert torch.equal(moments_of(one), moments_of(two))
    one_NLC, two_NLC = (stream_of(model, ids_NL, each) for each in (CPU, options(**other)))
    torch.testing.assert_close(one_NLC, two_NLC, atol=1e-5, rtol=1e-5)


def test_heldout_samples_enter_no_hessian() -> None:
    model = tiny_model("llama")
    ids_NL = random_ids(model, 6, 16)
    alone = walked(model, ids_NL[:4])
    expected_heldout = hooked_moments(model, ids_NL[4:])
    for sub_layer, without in zip(walked(model, ids_NL, num_heldout=2), alone, strict=True):
        torch.testing.assert_close(moments_of(sub_layer), moments_of(without), atol=1e-6, rtol=1e-5)
        assert sub_layer.hessian is not None
        assert sub_layer.hessian.num_tokens == 64
        assert sub_layer.heldout is not None
        assert sub_layer.heldout.num_tokens == 32
        torch.testing.assert_close(
            sub_layer.heldout.matrix_II.double(), expected_heldout[sub_layer.name], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_walk_returns_the_heldout_samples_stream(name: str) -> None:
    model = tiny_model(name)
    ids_NL = random_ids(model, 7, 16)
    walk = walk_layers(ResidentDecoder(model), ids_NL, CPU, num_heldout=2)
    for _ in range(6):
        next(walk)
    with pytest.raises(StopIteration) as finished:
        next(walk)
    stream_MLC: Tensor = finished.value.value
    assert stream_MLC.shape == (2, 16, 32)
    torch.testing.assert_close(logits_of_stream(model, stream_MLC), logits(model, ids_NL[5:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", FAMILIES)
def test_later_hessians_are_those_of_the_changed_model(name: str, budget: int | None) -> None:
    model = tiny_model(name)
    ids_NL = random_ids(model, 5, 16)
    dense = hooked_moments(model, ids_NL)
    seen: dict[str, Tensor] = {}
    for sub_layer in walk_layers(ResidentDecoder(model), ids_NL, options(activation_budget_bytes=budget)):
        seen[sub_layer.name] = moments_of(sub_layer)
        with torch.no_grad():
            sub_layer.linear.weight[:, ::3] = 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        for linear in outputs(other).values():
            linear.weight[:, ::3] = 0
    changed = hooked_moments(other, ids_NL)
    # only the first linear has its inputs before any change; beside it an MLP parallel to the attention
    unchanged = 2 if family_of(model).parallel_residual else 1
    for number, moment_name in enumerate(changed):
        assert_same_moments(seen[moment_name], changed[moment_name])
        assert torch.allclose(dense[moment_name], changed[moment_name], rtol=1e-2) == (number < unchanged)


@pytest.mark.parametrize("name", FAMILIES)
def test_unwanted_sub_layers_come_without_a_hessian_and_are_computed_all_the_same(name: str) -> None:
    model = tiny_model(name)
    ids_NL = random_ids(model, 5, 16)
    plain = {sub.name: moments_of(sub) for sub in walked(model, ids_NL)}
    some = walked(model, ids_NL, wanted=lambda layer, kind: (layer, kind) in {(1, "mlp"), (2, "attention")})
    assert [sub.name for sub in some] == list(plain)
    for sub_layer in some:
        wanted = (sub_layer.layer, sub_layer.kind) in {(1, "mlp"), (2, "attention")}
        assert (sub_layer.hessian is not None) == wanted
        if wanted:
            assert torch.equal(moments_of(sub_layer), plain[sub_layer.name])


class Calls:
    """Counts forwards by module name, of the model's modules and of their copies."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.forwards: Counter[str] = Counter()
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def count(_module: nn.Module, _args: Any) -> None:
            self.forwards[name] += 1

        return count


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("budget", [None, 0])
def test_every_sub_layer_runs_once_per_batch(budget: int | None, wanted: bool) -> None:
    model = tiny_model("llama")
    blocks = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp", "self_attn.q_proj")]
    linears = list(outputs(model))
    calls = Calls(model, [*blocks, *linears, "model.layers.0", "lm_head"])
    how = options(batch_size=2, activation_budget_bytes=budget)
    walked(model, random_ids(model, 7, 8), how, num_heldout=2, wanted=lambda layer, kind: wanted)
    batches = 3 + 1  # five samples and two held out, two at a time
    assert calls.forwards == Counter(dict.fromkeys(blocks + linears, batches))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stop_after", [None, 1, 4])
def test_the_model_is_left_as_it_was(training: bool, stop_after: int | None) -> None:
    model = tiny_model("qwen2", attention_dropout=0.5).train(training)
    before = copy.deepcopy(model)
    modules = dict(model.named_modules())
    walk = walk_layers(ResidentDecoder(model), random_ids(model), CPU)
    for number, sub_layer in enumerate(walk, start=1):
        with torch.no_grad():
            sub_layer.linear.weight.zero_()
        if number == stop_after:
            break
    walk.close()
    assert dict(model.named_modules()) == modules
    assert same_weights(model, before)
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


DROPOUTS: dict[str, dict[str, float]] = {
    "qwen2": {"attention_dropout": 0.5},
    "phi": {"attention_dropout": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "opt": {"attention_dropout": 0.5, "dropout": 0.5, "layerdrop": 0.9},
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_of_a_model_in_training_is_no_calibration_noise(name: str) -> None:
    model = tiny_model(name, **DROPOUTS[name])
    ids_NL = random_ids(model, 5, 16)
    quiet = [moments_of(sub_layer) for sub_layer in walked(model, ids_NL)]
    model.train()
    for sub_layer, expected_II in zip(walked(model, ids_NL), quiet, strict=True):
        assert torch.equal(moments_of(sub_layer), expected_II)
        assert not sub_layer.linear.training
        assert not sub_layer.linear.weight.requires_grad
    assert all(module.training for module in model.modules())


def test_a_failing_layer_leaves_the_model_whole() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    modules = dict(model.named_modules())
    with pytest.raises(PruningError, match=r"model\.layers\.1\.self_attn\.o_proj .* is not finite"):
        walked(model, random_ids(model))
    assert dict(model.named_modules()) == modules


class Asked(ResidentDecoder):
    """Remembers which layers were asked for, and where they should be."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.layers: list[tuple[int, str]] = []

    def layer(self, index: int, device: torch.device) -> nn.Module:
        self.layers.append((index, str(device)))
        return super().layer(index, device)


@pytest.mark.parametrize("stop_after", [None, 1, 2, 3])
def test_each_layer_is_asked_for_once_and_only_when_its_turn_comes(stop_after: int | None) -> None:
    decoder = Asked(tiny_model("llama"))
    walk = walk_layers(decoder, random_ids(decoder.skeleton), CPU)
    assert decoder.layers == []
    for number, sub_layer in enumerate(walk, start=1):
        assert decoder.layers == [(index, "cpu") for index in range(sub_layer.layer + 1)]
        if number == stop_after:
            break
    walk.close()


def test_walking_needs_no_gradients_and_leaves_none() -> None:
    model = tiny_model("llama")
    stream_NLC = stream_of(model, random_ids(model))
    assert torch.is_grad_enabled()
    assert not stream_NLC.requires_grad
    for sub_layer in walk_layers(ResidentDecoder(model), random_ids(model), CPU):
        assert torch.is_grad_enabled()  # the walk's no_grad is its own, not its caller's
        assert not moments_of(sub_layer).requires_grad


@pytest.mark.parametrize("name", ["llama", "gemma", "phi", "opt"])
def test_bfloat16_model(name: str) -> None:
    model = in_bfloat16(tiny_model(name))
    ids_NL = random_ids(model, 5, 16)
    expected = hooked_moments(model, ids_NL)
    for sub_layer in walked(model, ids_NL):
        assert sub_layer.hessian is not None
        assert sub_layer.hessian.matrix_II.dtype == torch.float32
        scale = float(expected[sub_layer.name].abs().max())
        torch.testing.assert_close(moments_of(sub_layer), expected[sub_layer.name], atol=0.02 * scale, rtol=0.05)
