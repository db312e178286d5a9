"""Two models and the memory there is: who goes to the host, what is measured all the same, and what is not begun."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import PreTrainedModel

from evaluation.profile import device, peak_memory, profiler
from evaluation.profile.config import ProfileConfig
from evaluation.profile.device import Reading
from evaluation.profile.peak_memory import available_bytes, least_bytes, with_resident_peaks
from evaluation.profile.profiler import profile
from evaluation.profile.report import ProfileReport
from evaluation.report import GIB
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

GRID = ProfileConfig(batch_size=[4, 1], prompt_len=8, new_tokens=3, warmup=0, runs=2, ratio_seconds=0)
DEVICE = torch.device("cpu:0")
"""Stands for an accelerator: only what is asked to go to the host is on "cpu"."""


class Memory:
    """Of a pretended device, on which a model and a reference are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, reference: PreTrainedModel) -> None:
        self.beside = False
        self.holds_both = True
        self.rows_beside = 100
        self.where: list[str] = []
        self._move = reference.to
        monkeypatch.setattr(reference, "to", self._to)
        model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _to(self, device: torch.device | str) -> PreTrainedModel:
        self.where.append(str(device))
        self.beside = torch.device(device) == DEVICE
        if self.beside and not self.holds_both:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._move(device)

    def _check(self, _: object, __: object, given: dict[str, Any]) -> None:
        if self.beside and given["input_ids"].shape[0] > self.rows_beside:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def rows_of(report: ProfileReport) -> dict[tuple[str, str], float]:
    return {(metric.task, metric.metric): metric.value for metric in report.metrics()}


def test_figures_without_the_reference_are_taken_while_it_is_away(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_SETTLE_S", 0.01)
    monkeypatch.setattr(device, "_SAMPLE_S", 0.01)
    reference = tiny_model("llama", layers=4)
    memory = Memory(monkeypatch, model, reference)
    memory.rows_beside = 2
    rows = rows_of(profile(model, GRID, reference=reference, device=DEVICE, meter=lambda: Reading(250.0, 90.0)))
    assert rows["profile b4 p8 n3", "latency_ms_p50"] > 0
    assert rows["profile b4 p8 n3", "power_w"] == 250.0
    assert ("profile b4 p8 n3", "prefill_ratio") not in rows
    assert rows["profile b1 p8 n3", "prefill_ratio"] > 0
    assert memory.where == [str(DEVICE), "cpu", str(DEVICE)]


def test_a_reference_whose_weights_do_not_fit_costs_the_ratios_only(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = tiny_model("llama", layers=4)
    memory = Memory(monkeypatch, model, reference)
    memory.holds_both = False
    memory.rows_beside = 0
    with caplog.at_level(logging.WARNING, "slimline"):
        rows = rows_of(profile(model, GRID, reference=reference, device=DEVICE))
    for name in ("profile b4 p8 n3", "profile b1 p8 n3"):
        assert rows[name, "latency_ms_p50"] > 0
        assert (name, "prefill_ratio") not in rows
    assert "the reference does not fit beside the model, no ratios" in caplog.text
    assert memory.where[-1] == "cpu"


def test_the_stage_loads_the_reference_on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pruning.checkpoints import save_load as checkpoint
    from tasks.devices.placement import Placement
    from tasks.stages.profile import fill

    loaded: list[tuple[str, dict[str, Any]]] = []
    report = profile(tiny_model("llama"), GRID)
    tiny_model("llama").save_pretrained(tmp_path / "pruned")

    def load(folder: Path, **where: Any) -> None:
        loaded.append((folder.name, where))

    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    monkeypatch.setattr(profiler, "profile", lambda *_, **__: report)
    monkeypatch.setattr(peak_memory, "with_resident_peaks", lambda report, *_, **__: report)
    request = SimpleNamespace(settings=GRID.model_dump(), checkpoint="pruned", reference="dense")
    accelerator = torch.device("cuda:0")
    for place in (Placement(accelerator), Placement(accelerator, device_map="auto")):
        store = SimpleNamespace(path=lambda name: tmp_path / name)
        bench = SimpleNamespace(store=store, place=place, folder=tmp_path, progress=lambda *_: None)
        fill(request, bench)  # type: ignore[arg-type]
    assert loaded == [
        ("pruned", {"device": accelerator}),
        ("dense", {"device": "cpu"}),
        ("pruned", {"device_map": "auto"}),
        ("dense", {"device_map": "auto"}),
    ]


def spread(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> PreTrainedModel:
    """The model as a device map leaves it; it must not be moved."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a spread model was moved")

    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    monkeypatch.setattr(model, "to", refuse)
    return model


def test_a_spread_model_stays_spread(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = spread(monkeypatch, tiny_model("llama", layers=4))
    rows = rows_of(profile(spread(monkeypatch, model), GRID, reference=reference))
    assert rows["profile b4 p8 n3", "latency_ms_p50"] > 0
    assert rows["profile b4 p8 n3", "prefill_ratio"] > 0


def test_a_spread_reference_that_was_put_off_the_devices_is_not_compared_with(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    reference = tiny_model("llama", layers=4)
    cpu_offload(reference, execution_device=torch.device("cpu"))
    reference.hf_device_map = {"": "cpu"}
    rows = rows_of(profile(model, GRID, reference=reference))
    assert rows["profile b4 p8 n3", "latency_ms_p50"] > 0
    assert ("profile b4 p8 n3", "prefill_ratio") not in rows
    assert "the reference does not fit beside the model, no ratios" in caplog.text


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "opt", "mistral"])
def test_the_least_memory_is_that_of_the_cache_and_little_more(family: str) -> None:
    model = tiny_model(family, layers=6)
    (point, _) = ProfileConfig(batch_size=[3, 1], prompt_len=60, new_tokens=41).points
    held = model(torch.zeros((3, 100), dtype=torch.long), use_cache=True).past_key_values
    cache = sum(tensor.nbytes for layer in held.layers for tensor in (layer.keys, layer.values))
    logits = 3 * 320 * 4
    assert cache + logits < least_bytes([model], point) <= cache + cache / 6 + logits
    assert 2 * cache < least_bytes([model, model], point) < 2 * least_bytes([model], point)


def test_a_window_bounds_the_cache() -> None:
    (point,) = ProfileConfig(prompt_len=60, new_tokens=41).points
    short = least_bytes([tiny_model("mistral", sliding_window=10)], point)
    assert short < least_bytes([tiny_model("mistral")], point) / 5


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16000 kB\nMemAvailable:    8000 kB\n"}


def test_what_is_there_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == math.inf
    assert available_bytes(write(tmp_path, MEMINFO)) == 8000 * 1024


@pytest.mark.parametrize("group", ["/", "/a", "/a/b"])  # a container sees its own group as the root, or under its path
def test_a_control_group_leaves_less(tmp_path: Path, group: str) -> None:
    folder = f"sys/fs/cgroup{group.rstrip('/')}"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        f"{folder}/memory.max": "5000000\n",
        f"{folder}/memory.current": "4000000\n",
        f"{folder}/memory.stat": "anon 3000000\ninactive_file 600000\nactive_file 100000\n",
    }
    assert available_bytes(write(tmp_path, MEMINFO | files)) == 1_700_000
    write(tmp_path, {f"{folder}/memory.max": "max\n"})
    assert available_bytes(tmp_path) == 8000 * 1024


def test_an_old_control_group_leaves_less(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/x\n0::/\n",
        f"{folder}/memory.limit_in_bytes": "5000000\n",
        f"{folder}/memory.usage_in_bytes": "4000000\n",
        f"{folder}/memory.stat": "inactive_file 1\ntotal_inactive_file 600000\ntotal_active_file 100000\n",
    }
    assert available_bytes(write(tmp_path, MEMINFO | files)) == 1_700_000
    write(tmp_path, {f"{folder}/memory.limit_in_bytes": "9223372036854771712\n"})
    assert available_bytes(tmp_path) == 8000 * 1024


def bytes_at(model: PreTrainedModel, batch: int) -> int:
    point = next(point for point in GRID.points if point.batch_size == batch)
    return least_bytes([model], point)


def test_a_point_for_which_the_host_has_not_the_memory_is_not_begun(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = bytes_at(model, 4) - 1
    monkeypatch.setattr(profiler, "available_bytes", lambda: left)
    with caplog.at_level(logging.WARNING, "slimline"):
        rows = rows_of(profile(model, GRID))
    assert rows["profile b4 p8 n3", "out_of_memory"] == 1
    assert rows["profile b1 p8 n3", "latency_ms_p50"] > 0
    assert [record.message for record in caplog.records] == [
        "batch 4, prompt 8, 3 new tokens: needs at least "
        f"{bytes_at(model, 4) / GIB:.2f} GiB of memory, and {left / GIB:.2f} GiB are there",
        "batch 4, prompt 8, 3 new tokens: out of memory, no figures for this grid point",
    ]
    looks = iter([left, left + 1] * 2)  # what was freed comes back when it is asked for
    monkeypatch.setattr(profiler, "available_bytes", lambda: next(looks))
    assert rows_of(profile(model, GRID))["profile b4 p8 n3", "latency_ms_p50"] > 0


def test_caches_that_fit_one_after_the_other_cost_the_ratios_only(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = bytes_at(model, 4)
    monkeypatch.setattr(profiler, "available_bytes", lambda: left)
    with caplog.at_level(logging.WARNING, "slimline"):
        (four, one) = profile(model, GRID, reference=tiny_model("llama")).points
    assert four.comparison is not None
    assert four.comparison.prefill_ratio is None
    assert one.comparison is not None
    assert one.comparison.prefill_ratio is not None
    assert "the caches of both models do not fit at once, no ratios" in caplog.text


def test_resident_memory_is_of_the_cpu_only(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = profile(model, GRID).model_copy(update={"device": "mps:0"})
    monkeypatch.setattr(peak_memory, "peak_resident_gib", lambda *_: pytest.fail("a figure of another device"))
    assert with_resident_peaks(report, tmp_path, GRID, model_class="transformers:LlamaForCausalLM") == report


def test_the_measuring_process_ends_with_the_one_that_waits_for_it(tmp_path: Path) -> None:
    """Its standard input is at its end: nobody is there any more."""
    command = [sys.executable, "-m", "evaluation.profile.peak_memory", str(tmp_path), GRID.model_dump_json(), "a:b"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
