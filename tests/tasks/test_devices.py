"""Who computes where, and who waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from infra.errors import SettingsInvalid
from tasks.devices import _PATIENCE, BALANCED, DevicePool, Placement, device_label, device_names, pool

TWO = (Placement(torch.device("cuda:0")), Placement(torch.device("cuda:1")))


class Watch:
    """Counts who is inside at once."""

    def __init__(self) -> None:
        self.lock, self.inside, self.most = threading.Lock(), 0, 0
        self.seen: list[str] = []

    def visit(self, name: str, seconds: float = 0.02) -> None:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.seen.append(name)
        time.sleep(seconds)
        with self.lock:
            self.inside -= 1


def test_one_stage_per_device() -> None:
    places, watch, used = DevicePool(TWO), Watch(), set()

    def work() -> None:
        with places.one() as place:
            used.add(place)
            watch.visit("one")

    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(work)
    assert len(watch.seen) == 8
    assert watch.most == 2
    assert used == set(TWO)


def test_who_takes_all_is_alone() -> None:
    places, alone = DevicePool(TWO), []
    watch = Watch()

    def one() -> None:
        with places.one():
            watch.visit("one")

    def everything() -> None:
        with places.all() as place:
            alone.append(watch.inside == 0)
            assert place == TWO[0]
            watch.visit("all")
            alone.append(watch.most <= 2)

    with ThreadPoolExecutor(12) as threads:
        done = [threads.submit(everything if index % 3 == 0 else one) for index in range(12)]
    for future in done:
        future.result(timeout=10)
    assert all(alone)
    assert sorted(watch.seen) == ["all"] * 4 + ["one"] * 8


def test_a_place_is_given_back_after_a_failure() -> None:
    places = DevicePool(TWO[:1])
    with pytest.raises(RuntimeError), places.one():
        raise RuntimeError
    with pytest.raises(RuntimeError), places.all():
        raise RuntimeError
    with places.one() as place:
        assert place == TWO[0]


def served(places: DevicePool, needs: list[str | None]) -> list[str | None]:
    """In which order those who ask in this order, while all is taken, are served."""
    order: list[str | None] = []

    def work(key: str | None) -> None:
        with places.one(key):
            order.append(key)
            time.sleep(0.005)

    with ThreadPoolExecutor(len(needs)) as threads, places.one():
        for number, key in enumerate(needs, start=1):
            threads.submit(work, key)
            while len(places._queue) < number:
                time.sleep(0.001)
    return order


def test_suites_of_a_checkpoint_follow_one_another() -> None:
    asked = ["dense", None, "pruned", "dense", "tuned", "pruned", "dense", "tuned"]
    order = served(DevicePool(TWO[:1]), asked)
    assert order == ["dense"] * 3 + [None] + ["pruned"] * 2 + ["tuned"] * 2


def test_nobody_waits_for_ever() -> None:
    order = served(DevicePool(TWO[:1]), ["dense", None, *["dense"] * 20])
    assert order == [*["dense"] * (1 + _PATIENCE), None, *["dense"] * (20 - _PATIENCE)]


def test_the_place_with_the_model_is_taken_first() -> None:
    places = DevicePool(TWO)
    with places.one("dense") as first, places.one("pruned") as second:
        pass
    for _ in range(2):
        with places.one("pruned") as place:
            assert place == second
        with places.one("dense") as place:
            assert place == first
    with places.one() as emptied:  # both held a model
        pass
    for key in (None, "tuned"):
        with places.one(key) as place:
            assert place == emptied, "the other still holds one"
    with places.all():
        pass
    assert not places._loaded


def test_the_pool_is_shared_by_a_process() -> None:
    assert pool("cpu") is pool("cpu")
    with pool("cpu").one() as place:
        assert place.device == torch.device("cpu")
        assert place.load == {"device": torch.device("cpu")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA devices")
def test_without_cuda_everything_is_the_cpu() -> None:
    assert device_names("auto") == device_names(BALANCED) == device_names("cpu") == ("cpu",)
    with pool(BALANCED).one() as place:
        assert place.load == {"device_map": "auto"}


@pytest.mark.parametrize("setting", ["cuda:99", "cuda:64", "bogus", "xpu", "mps:3"])
def test_a_device_that_is_not_there_is_named(setting: str) -> None:
    with pytest.raises(SettingsInvalid, match=f"SLIMLINE_DEVICE={setting}"):
        device_names(setting)


def test_a_label_is_the_hardware_not_the_setting() -> None:
    label = device_label("cpu")
    assert label.startswith("cpu ")
    assert "cores)" in label
    if not torch.cuda.is_available():
        assert device_label("auto") == device_label(BALANCED) == label


def test_a_label_needs_no_torch_on_a_machine_without_cuda() -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has an NVIDIA driver")
    code = "import sys; from tasks.devices import device_label; device_label('auto'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
