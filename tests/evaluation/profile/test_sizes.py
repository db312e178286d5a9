"""Parameters, multiply-accumulates and the KV cache, against what modules and caches really do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from evaluation.profile.config import ProfileConfig
from evaluation.profile.profiler import profile
from evaluation.profile.sizes import attention_macs, attention_shapes, linear_macs_per_token
from evaluation.report import GIB
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from tests.tiny import FAMILIES, random_ids, random_plan, tiny_model

CONFIG = ProfileConfig(batch_size=2, prompt_len=16, new_tokens=2, warmup=0, runs=1)


def uneven_model(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family, layers=4)
    shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=1))
    return model.eval()


def test_sizes_are_counted_from_the_shapes() -> None:
    report = profile(tiny_model("llama"), CONFIG)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    linears = 3 * (attention + 3 * 32 * 48)
    assert report.num_decoder_parameters == linears + 3 * 2 * 32
    assert report.num_parameters == report.num_decoder_parameters + 2 * 320 * 32 + 32
    assert report.linear_macs_per_token == linears + 320 * 32
    assert report.macs_64_tokens == 64 * report.linear_macs_per_token + 3 * 2 * 8 * 64**2 * 4
    assert report.points[0].attention_macs == 2 * 3 * 2 * 8 * 16**2 * 4
    assert report.weights_gib == pytest.approx(4 * report.num_parameters / GIB, rel=0.01)
    assert report.kv_cache_bytes_per_token == 3 * 2 * 16 * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_parameters_are_those_of_the_layers(name: str) -> None:
    model = tiny_model(name)
    report = profile(model, CONFIG)
    layers = sum(weight.numel() for key, weight in model.named_parameters() if ".layers." in key)
    assert report.num_decoder_parameters == layers > 0
    assert report.num_parameters == sum(weight.numel() for weight in model.parameters())


def test_tied_embeddings_count_once() -> None:
    tied = profile(tiny_model("llama", tie_word_embeddings=True), CONFIG)
    assert tied.num_parameters == tied.num_decoder_parameters + 320 * 32 + 32


@pytest.mark.parametrize("name", [*FAMILIES, "uneven", "uneven-opt", "uneven-qwen3"])
@torch.inference_mode()
def test_macs_are_those_of_the_multiplications_that_a_forward_pass_does(name: str) -> None:
    family = name.removeprefix("uneven").removeprefix("-") or "llama"
    model = uneven_model(family) if name.startswith("uneven") else tiny_model(family)
    model.set_attn_implementation("eager")
    found = attention_shapes(model)
    linear = 0

    def count(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        nonlocal linear
        linear += inputs[0].numel() * module.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        model(random_ids(model, batch=2, length=12), use_cache=True)
    total = counter.get_total_flops() // 2
    rotary = total - linear - attention_macs(found, batch_size=2, length=12)
    # rotary embedding multiplies each position by its frequencies, with a matmul
    assert 0 <= rotary <= 2 * 12 * 64
    assert linear == 2 * 12 * linear_macs_per_token(model)


@pytest.mark.parametrize("name", [*FAMILIES, "uneven"])
@torch.inference_mode()
def test_cache_bytes_are_those_of_the_cache(name: str) -> None:
    model = uneven_model() if name == "uneven" else tiny_model(name)
    cache = model(random_ids(model, batch=3, length=20), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    found = attention_shapes(model)
    assert 3 * 20 * sum(shape.cache_bytes_per_token for shape in found) == held
    if name == "uneven":
        assert len({shape.cache_bytes_per_token for shape in found}) > 1


def test_a_sliding_window_does_not_hide_a_tokens_bytes() -> None:
    model = tiny_model("mistral", sliding_window=8)
    assert profile(model, CONFIG).kv_cache_bytes_per_token == 3 * 2 * 16 * 4


def test_half_precision_halves_the_cache() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    assert profile(model, CONFIG).kv_cache_bytes_per_token == 3 * 2 * 16 * 2


def test_macs_of_experts_are_those_of_the_ones_that_a_token_goes_to() -> None:
    mixtral, llama = tiny_model("mixtral"), tiny_model("llama", intermediate=24)
    # of 4 experts with 24 channels each two, where the Llama has one such MLP; and the router
    of_layer = 2 * 3 * 32 * 24 + 4 * 32
    assert linear_macs_per_token(mixtral) == linear_macs_per_token(llama) + 3 * (of_layer - 3 * 32 * 24)
