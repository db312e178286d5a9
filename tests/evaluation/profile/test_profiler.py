from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from evaluation.errors import EvaluationError
from evaluation.profile.compilation import check_compiler, set_attention_
from evaluation.profile.config import ProfileConfig
from evaluation.profile.device import device_name
from evaluation.profile.peak_memory import peak_resident_gib, with_resident_peaks
from evaluation.profile.profiler import profile
from evaluation.profile.report import ProfileReport
from evaluation.profile.timed_generation import Runner, random_prompt, timed_run
from evaluation.report import GIB
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

CONFIG = ProfileConfig(batch_size=2, prompt_len=16, new_tokens=4, warmup=1, runs=3, ratio_seconds=0)
(POINT,) = CONFIG.points
GRID = ProfileConfig(batch_size=[1, 4], prompt_len=8, new_tokens=[1, 3], warmup=0, runs=2, ratio_seconds=0)


def run(model: PreTrainedModel, new_tokens: int, clock: Iterator[float] | None = None) -> Any:
    more = {} if clock is None else {"clock": lambda: next(clock)}
    return timed_run(Runner(model, model), random_prompt(model, POINT, 0), new_tokens, **more)


def test_a_profile_is_finite_and_says_its_conditions(model: PreTrainedModel) -> None:
    shares: list[float] = []
    report = profile(model, CONFIG, progress=lambda share, message: shares.append(share))
    (point,) = report.points
    assert point.speed is not None
    assert 0 < point.speed.prefill_ms.p50 <= point.speed.ttft_ms.p50 <= point.speed.latency_ms.p50
    assert point.speed.decode_ms_per_token is not None
    assert 0 < point.speed.decode_ms_per_token.p50 <= point.speed.decode_ms_per_token.p90
    assert point.speed.tokens_per_s == pytest.approx(1000 * 2 * 4 / point.speed.latency_ms.p50)
    assert all(math.isfinite(metric.value) for metric in report.metrics())
    assert {metric.task for metric in report.metrics()} == {"profile"}
    assert (report.device, report.dtype, report.device_name) == ("cpu", "float32", device_name("cpu"))
    assert report.conditions() == {
        "device_name": device_name("cpu"),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "attn_implementation": "sdpa",
        "compile": False,
        "warmup": 1,
        "runs": 3,
        "batch_size": 2,
        "prompt_len": 16,
        "new_tokens": 4,
    }
    assert point.comparison is None
    assert point.peak_memory_gib is None
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert ProfileReport.model_validate_json(report.model_dump_json()) == report


def test_a_grid_point_has_rows_of_its_own(model: PreTrainedModel) -> None:
    report = profile(model, GRID, reference=tiny_model("llama", layers=4))
    rows = {(metric.task, metric.metric): metric for metric in report.metrics()}
    names = {"profile b1 p8 n1", "profile b1 p8 n3", "profile b4 p8 n1", "profile b4 p8 n3"}
    assert {task for task, _ in rows} == {"profile", *names}
    assert ("profile", "num_parameters") in rows
    for name in names:
        assert rows[name, "latency_ms_p50"].num_examples == 2
        assert rows[name, "prefill_ratio"].value > 0
        assert ((name, "decode_ratio") in rows) == ("n3" in name) == ((name, "decode_ms_per_token_p50") in rows)
    assert rows["profile b4 p8 n3", "decode_ratio"].num_examples == 2 * 2
    assert report.conditions()["batch_size"] == [1, 4]
    assert report.conditions()["prompt_len"] == 8
    threads = torch.get_num_threads()
    assert str(report.conditions()["ratio"]).endswith("processor time")
    assert (report.conditions()["threads"], report.conditions()["ratio_threads"]) == (threads, max(1, threads // 2))


def test_a_model_is_as_fast_as_itself(model: PreTrainedModel) -> None:
    config = ProfileConfig(prompt_len=32, new_tokens=8, runs=15, ratio_seconds=0.5)
    (point,) = profile(model, config, reference=tiny_model("llama")).points
    assert point.comparison is not None
    for ratio in (point.comparison.prefill_ratio, point.comparison.decode_ratio):
        assert ratio is not None
        assert 0.5 < ratio.value < 2
        assert ratio.stderr is not None
        assert ratio.low is not None
        assert ratio.high is not None
        assert ratio.low < ratio.value < ratio.high


def test_a_smaller_model_is_faster_than_its_reference() -> None:
    small, large = tiny_model("llama", layers=1), tiny_model("llama", layers=12)
    report = profile(small, ProfileConfig(prompt_len=32, new_tokens=8, ratio_seconds=0.5), reference=large)
    comparison = report.points[0].comparison
    assert comparison is not None
    assert comparison.decode_ratio is not None
    assert comparison.decode_ratio.value < 0.7
    assert comparison.latency_ratio is not None
    assert comparison.latency_ratio < 0.8
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
    run(model, new_tokens=6)
    assert steps == 6


def test_only_decoding_after_the_prompt_uses_the_cache(model: PreTrainedModel) -> None:
    lengths: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    run(model, new_tokens=3)
    assert lengths == [16, 1, 1]


def test_the_tokens_are_those_of_generate(model: PreTrainedModel) -> None:
    prompt_BL = random_prompt(model, POINT, 0)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    run(model, new_tokens=5)
    ours = torch.cat(seen[1:], dim=1)
    model.generation_config.eos_token_id = None
    mask_BL = torch.ones_like(prompt_BL)
    expected = model.generate(prompt_BL, attention_mask=mask_BL, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, expected[:, 16:20])


def test_each_time_is_told_from_the_start(model: PreTrainedModel) -> None:
    timed = run(model, 5, iter((10.0, 10.5, 10.6, 12.6)))
    assert timed.prefill_ms == pytest.approx(500)
    assert timed.ttft_ms == pytest.approx(600)
    assert timed.latency_ms == pytest.approx(2600)
    assert timed.decode_ms_per_token == pytest.approx(500)
    assert run(model, 1).decode_ms_per_token is None


def test_the_prompt_is_seeded(model: PreTrainedModel) -> None:
    assert torch.equal(random_prompt(model, POINT, 0), random_prompt(model, POINT, 0))
    assert not torch.equal(random_prompt(model, POINT, 0), random_prompt(model, POINT, 1))


def test_lengths_beyond_the_models_positions_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(EvaluationError, match=r"prompt_len 500 \+ new_tokens 32.*of 512"):
        profile(model, ProfileConfig(prompt_len=[8, 500]))


def test_the_model_comes_back_in_its_mode(model: PreTrainedModel) -> None:
    model.train()
    profile(model, CONFIG)
    assert model.training


def fails_beyond(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The model, with memory for so many rows of two or more tokens."""

    def check(_: object, __: object, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


def test_a_grid_point_that_does_not_fit_is_marked_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    model = fails_beyond(tiny_model("llama"), 2)
    config = GRID.model_copy(update={"batch_size": (4, 1)})
    with caplog.at_level(logging.WARNING, "slimline"):
        report = profile(model, config, reference=tiny_model("llama"))
    rows = {(metric.task, metric.metric): metric.value for metric in report.metrics()}
    for tokens in (1, 3):
        assert rows[f"profile b4 p8 n{tokens}", "out_of_memory"] == 1
        assert (f"profile b4 p8 n{tokens}", "latency_ms_p50") not in rows
        assert rows[f"profile b1 p8 n{tokens}", "latency_ms_p50"] > 0
        assert rows[f"profile b1 p8 n{tokens}", "prefill_ratio"] > 0
        assert (f"profile b1 p8 n{tokens}", "out_of_memory") not in rows
    assert [record.message for record in caplog.records] == [
        f"batch 4, prompt 8, {tokens} new tokens: out of memory, no figures for this grid point" for tokens in (1, 3)
    ]
    assert ProfileReport.model_validate_json(report.model_dump_json()) == report


def test_a_reference_that_does_not_fit_costs_the_ratio_only(caplog: pytest.LogCaptureFixture) -> None:
    reference = fails_beyond(tiny_model("llama", layers=4), 2)
    with caplog.at_level(logging.WARNING, "slimline"):
        report = profile(tiny_model("llama"), GRID, reference=reference)
    rows = {(metric.task, metric.metric) for metric in report.metrics()}
    assert ("profile b4 p8 n3", "latency_ms_p50") in rows
    assert ("profile b4 p8 n3", "prefill_ratio") not in rows
    assert ("profile b1 p8 n3", "prefill_ratio") in rows
    assert "the reference does not fit beside the model" in caplog.text


def test_another_error_is_not_taken_for_one(model: PreTrainedModel) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        profile(model, CONFIG)
    hook.remove()


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(model: PreTrainedModel, asked: str) -> None:
    modules = [layer.self_attn for layer in model.model.layers]
    report = profile(model, CONFIG.model_copy(update={"attn_implementation": asked}))
    assert report.attn_implementation == asked
    assert {module.config._attn_implementation for module in modules} == {asked}
    assert report.conditions()["attn_implementation"] == asked


def test_an_attention_that_a_model_does_not_have_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(EvaluationError, match="attn_implementation 'flash_attention_9'"):
        set_attention_(model, "flash_attention_9")


def test_no_compiler_is_said_before_the_work(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler()

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(EvaluationError, match=r"compile: true needs a C\+\+ compiler"):
        profile(model, CONFIG.model_copy(update={"compile": True}))


def test_a_compiled_model_is_called_compiled(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Without the minutes that inductor takes; the test below has them."""
    compiled: list[object] = []

    def compile_(given: PreTrainedModel, **options: object) -> Any:
        compiled.append(options)
        return given.forward

    monkeypatch.setattr(torch, "compile", compile_)
    check_compiler("cpu")
    report = profile(model, CONFIG.model_copy(update={"compile": True}), reference=tiny_model("llama"))
    assert compiled == [{"dynamic": True}] * 2
    assert report.conditions()["compile"] is True


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


def test_a_child_that_fails_costs_its_own_figure_only(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from evaluation.profile import peak_memory

    def measure(folder: Path, config: ProfileConfig, model_class: str) -> peak_memory.PeakMemory:
        (point,) = config.points
        if point.batch_size == 4:
            raise EvaluationError(f"peak memory of {folder} could not be measured: exit code -9")
        return peak_memory.PeakMemory(libraries_gib=0.5, peak_gib=0.5 + point.new_tokens)

    monkeypatch.setattr(peak_memory, "peak_resident_gib", measure)
    report = with_resident_peaks(profile(model, GRID), tmp_path, GRID, model_class="transformers:LlamaForCausalLM")
    assert [point.peak_memory_gib for point in report.points] == [1, 3, None, None]
    assert "exit code -9; the report has no peak memory for profile b4 p8 n1" in caplog.text
