from __future__ import annotations

import time

import pytest
import torch
from transformers import PreTrainedModel

from evaluation.profile import device as device_module
from evaluation.profile.config import ProfileConfig
from evaluation.profile.device import Reading, mean_reading, meter_of
from evaluation.profile.profiler import profile
from evaluation.profile.timed_generation import wait_for

CONFIG = ProfileConfig(prompt_len=8, new_tokens=2, warmup=0, runs=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_SETTLE_S", 0.05)
    monkeypatch.setattr(device_module, "_SAMPLE_S", 0.2)
    monkeypatch.setattr(device_module, "_INTERVAL_S", 0.02)


def test_the_first_second_does_not_count() -> None:
    started = time.monotonic()
    work = 0

    def meter() -> Reading:
        return Reading(power_w=100.0 if time.monotonic() - started < 0.05 else 300.0, utilization_percent=80.0)

    def generate() -> None:
        nonlocal work
        work += 1
        time.sleep(0.01)

    assert mean_reading(meter, generate) == Reading(300.0, 80.0)
    assert work > 5


def test_power_is_a_row_where_the_device_tells(model: PreTrainedModel) -> None:
    report = profile(model, CONFIG, meter=lambda: Reading(power_w=250.0))
    values = {metric.metric: metric.value for metric in report.metrics()}
    assert values["power_w"] == 250.0
    assert "utilization_percent" not in values


def test_a_device_that_does_not_tell_has_no_row(model: PreTrainedModel) -> None:
    assert meter_of((torch.device("cpu"),)) is None
    names = {metric.metric for metric in profile(model, CONFIG).metrics()}
    assert not names & {"power_w", "utilization_percent"}


def test_a_package_that_is_missing_is_a_device_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "power_draw", missing)
    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert meter_of((torch.device("cuda:0"),)) is None


def test_devices_are_summed_and_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 1000 * (100 + device.index))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 50 + 10 * device.index)
    meter = meter_of((torch.device("cuda:0"), torch.device("cuda:1")))
    assert meter is not None
    assert meter() == Reading(201.0, 55.0)


def test_what_one_device_does_not_tell_is_not_told_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(device: torch.device) -> int:
        if device.index:
            raise RuntimeError("Not Supported")
        return 100_000

    monkeypatch.setattr(torch.cuda, "power_draw", draw)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 50)
    meter = meter_of((torch.device("cuda:0"), torch.device("cuda:1")))
    assert meter is not None
    assert meter() == Reading(None, 50.0)


@pytest.mark.parametrize("reported, expected", [(250, 250.0), (0, None)])
def test_rocm_tells_watts_and_nothing_as_zero(
    monkeypatch: pytest.MonkeyPatch, reported: int, expected: float | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: reported)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 50)
    meter = meter_of((torch.device("cuda:0"),))
    assert meter is not None
    assert meter() == Reading(expected, 50.0)


def test_a_word_is_not_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's library says "N/A"."""
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 250_000)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: "N/A")
    meter = meter_of((torch.device("cuda:0"),))
    assert meter is not None
    assert meter() == Reading(250.0, None)


@pytest.mark.parametrize("device, waited", [("cpu", False), ("cuda:1", True), ("mps", True), ("xpu:0", True)])
def test_every_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch, device: str, waited: bool) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", asked.append)
    wait_for(torch.device(device))
    assert asked == [torch.device(device)] * waited
