from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from evaluation.device import device_name
from evaluation.errors import EvaluationError
from evaluation.generation import random_prompt, timed_run
from evaluation.peak_memory import peak_resident_gib
from evaluation.profile_config import ProfileConfig
from evaluation.profiler import profile
from evaluation.report import GIB, ProfileReport
from tests.tiny import FAMILIES, tiny_model

CONFIG = ProfileConfig(batch_size=2, prompt_len=16, new_tokens=4, warmup=1, runs=3)


def test_a_profile_is_finite_and_says_its_conditions(model: PreTrainedModel) -> None:
    shares: list[float] = []
    report = profile(model, CONFIG, progress=lambda share, message: shares.append(share))

    assert 0 < report.prefill_ms.p50 <= report.prefill_ms.p90
    assert 0 < report.decode_ms_per_token.p50 <= report.decode_ms_per_token.p90
    assert report.tokens_per_s == pytest.approx(2000 / report.decode_ms_per_token.p50)
    assert all(math.isfinite(metric.value) for metric in report.metrics())
    assert (report.device, report.dtype, report.device_name) == ("cpu", "float32", device_name("cpu"))
    assert (report.batch_size, report.prompt_len, report.new_tokens, report.runs) == (2, 16, 4, 3)
    assert report.threads == torch.get_num_threads()
    assert report.comparison is None
    assert report.peak_memory_gib is None
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert ProfileReport.model_validate_json(report.model_dump_json()) == report


def test_sizes_are_counted_from_the_shapes() -> None:
    report = profile(tiny_model("llama"), CONFIG)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    linears = 3 * (attention + 3 * 32 * 48)
    assert report.num_decoder_parameters == linears + 3 * 2 * 32
    assert report.num_parameters == report.num_decoder_parameters + 2 * 320 * 32 + 32
    assert report.linear_macs_per_token == linears + 320 * 32
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


def test_a_model_is_as_fast_as_itself(model: PreTrainedModel) -> None:
    config = ProfileConfig(prompt_len=32, new_tokens=8, runs=15)
    report = profile(model, config, reference=tiny_model("llama"))
    assert report.comparison is not None
    assert 0.5 < report.comparison.prefill_ratio < 2
    assert 0.5 < report.comparison.decode_ratio < 2
    assert {"prefill_ratio", "decode_ratio"} <= {metric.metric for metric in report.metrics()}


def test_a_smaller_model_is_faster_than_its_reference() -> None:
    small, large = tiny_model("llama", layers=1), tiny_model("llama", layers=12)
    report = profile(small, ProfileConfig(prompt_len=32, new_tokens=8), reference=large)
    assert report.comparison is not None
    assert report.comparison.decode_ratio < 0.7
    assert report.num_decoder_parameters < 12000


def test_decoding_goes_on_after_an_eos_token() -> None:
    model = tiny_model("llama")
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    torch.nn.init.zeros_(model.lm_head.weight)  # every step picks token 0, and token 0 ends a text:
    model.config.eos_token_id = 0
    model.register_forward_hook(count)
    timed_run(model, random_prompt(model, CONFIG), new_tokens=6)
    assert steps == 1 + 6


def test_only_decoding_after_the_prompt_uses_the_cache(model: PreTrainedModel) -> None:
    lengths: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    timed_run(model, random_prompt(model, CONFIG), new_tokens=3)
    assert lengths == [16, 1, 1, 1]


def test_the_prompt_is_seeded(model: PreTrainedModel) -> None:
    assert torch.equal(random_prompt(model, CONFIG), random_prompt(model, CONFIG))
    other = CONFIG.model_copy(update={"seed": 1})
    assert not torch.equal(random_prompt(model, CONFIG), random_prompt(model, other))


def test_lengths_beyond_the_models_positions_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(EvaluationError, match=r"prompt_len 500 \+ new_tokens 32.*of 512"):
        profile(model, ProfileConfig(prompt_len=500))


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"batch_size": 0}, {"new_tokens": 0}, {"prompt": 3}])
def test_a_senseless_config_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        ProfileConfig.model_validate(wrong)


def test_the_model_comes_back_in_its_mode(model: PreTrainedModel) -> None:
    model.train()
    profile(model, CONFIG)
    assert model.training


@pytest.mark.slow  # two fresh processes that import transformers
def test_peak_memory_is_that_of_the_child_alone(tmp_path: Path) -> None:
    small = tmp_path / "small"
    tiny_model("llama").save_pretrained(small)
    large = tmp_path / "large"
    model = tiny_model("llama", hidden=512, intermediate=4096, layers=4)
    model.save_pretrained(large)
    weights = sum(p.numel() for p in model.parameters()) * 4 / GIB
    ballast = torch.ones(2**28)  # 1 GiB here must not show there

    little = peak_resident_gib(small, CONFIG, "transformers:LlamaForCausalLM")
    much = peak_resident_gib(large, CONFIG, "transformers:LlamaForCausalLM")

    assert ballast.numel()
    assert 0.05 < little.libraries_gib < little.peak_gib < 1.0
    assert little.model_gib < 0.1
    assert 0.9 * weights < much.model_gib < 3 * weights + 0.1


@pytest.mark.slow  # a fresh process that imports transformers
def test_peak_memory_of_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=f"peak memory of {tmp_path / 'none'} could not be measured"):
        peak_resident_gib(tmp_path / "none", CONFIG, "transformers:LlamaForCausalLM")
