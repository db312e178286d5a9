"""Who computes where, and who waits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from infra.errors import SettingsInvalid
from tasks.devices.placement import BALANCED, GPU_DRIVERS, Placement, device_label, device_names
from tasks.devices.pool import DevicePool, DeviceRequest, evict_idle_models, pool

TWO = (Placement(torch.device("cuda:0")), Placement(torch.device("cuda:1")))
LEASED = (
    Placement(torch.device("cuda:0"), accelerators=("b",)),
    Placement(torch.device("cuda:1"), accelerators=("a",)),
)
CPU = Placement(torch.device("cpu"))
Take = Callable[[DevicePool, str | None], AbstractContextManager[Placement]]


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


class Diary:
    """A pool whose leases and evictions are written down in their order."""

    def __init__(self, *places: Placement) -> None:
        self.lines: list[str] = []
        self.places = DevicePool(places, self.lease, self.evict)

    @contextmanager
    def lease(self, name: str, wait: bool) -> Iterator[bool]:
        self.lines.append(f"lease {name}")
        try:
            yield True
        finally:
            self.lines.append(f"return {name}")

    def evict(self, place: Placement) -> None:
        self.lines.append(f"evict {', '.join(place.accelerators) or place.device}")

    def read(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def served(
    places: DevicePool, asked: list[tuple[Take, str | None]], *, first: tuple[Take, str | None] = (DevicePool.one, None)
) -> list[str | None]:
    """In which order those who ask in this order, while all is taken, are served."""
    order: list[str | None] = []

    def work(take: Take, key: str | None) -> None:
        with take(places, key):
            order.append(key)
            time.sleep(0.005)

    with ThreadPoolExecutor(len(asked)) as threads, first[0](places, first[1]):
        for number, (take, key) in enumerate(asked, start=1):
            threads.submit(work, take, key)
            while len(places._queue) < number:
                time.sleep(0.001)
    return order


ONE, ALL = DevicePool.one, DevicePool.all


def test_first_come_first_served() -> None:
    asked: list[str | None] = ["dense", None, "pruned", "dense", "tuned", "pruned", "dense", "tuned"]
    assert served(DevicePool(TWO[:1]), [(ONE, key) for key in asked]) == asked


def test_who_waits_for_all_is_passed_by_nobody() -> None:
    asked: list[tuple[Take, str | None]] = [(ONE, "a"), (ALL, "all"), *[(ONE, f"b{number}") for number in range(9)]]
    order = served(DevicePool(TWO, evict_from=lambda place: None), asked, first=(ALL, None))
    assert order[:2] == ["a", "all"]
    assert sorted(order[2:], key=str) == [key for _, key in asked[2:]]


def test_a_model_is_evicted_before_the_lease_is_given_back() -> None:
    diary = Diary(LEASED[0])
    with diary.places.one("dense"):
        assert diary.read() == ["lease b"]
    assert diary.read() == ["evict b", "return b"]
    with pytest.raises(RuntimeError), diary.places.one("dense"):
        raise RuntimeError
    assert diary.read() == ["lease b", "evict b", "return b"]


def test_who_comes_next_and_needs_the_same_gets_it_with_its_lease() -> None:
    diary = Diary(LEASED[0])
    served(diary.places, [(ONE, "dense"), (ONE, "dense"), (ONE, "pruned")], first=(ONE, "dense"))
    assert diary.read() == ["lease b", "evict b", "return b"] * 2


def test_a_slot_of_the_server_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect ends the thread that took a slot if the slot is lost, and no other."""
    diary = Diary(LEASED[0])
    monkeypatch.setattr("tasks.devices.pool.server_lease", diary.places._lease)
    served(diary.places, [(ONE, "dense")], first=(ONE, "dense"))
    assert diary.read() == ["lease b", "evict b", "return b"] * 2


def test_on_the_cpu_a_model_stays_until_something_else_comes_or_nobody_does() -> None:
    diary = Diary(CPU)
    for needs in ("dense", "dense", "pruned"):
        with diary.places.one(needs):
            pass
    assert diary.read() == []
    with diary.places.one():
        assert diary.read() == ["evict cpu"]
    with diary.places.one("dense"):
        diary.places.evict_idle()
        assert diary.read() == [], "it is used"
    diary.places.evict_idle()
    assert diary.read() == ["evict cpu"]


def test_all_places_are_taken_empty_and_evicted_before_the_first_is_given_back() -> None:
    diary = Diary(*LEASED)
    with diary.places.all():
        assert diary.read() == ["lease a", "lease b", "evict b", "evict a"]
    assert diary.read() == ["evict b", "evict a", "return b", "return a"]
    with diary.places.all("dense"):  # its model may be on the first one
        assert diary.read() == ["lease a", "lease b"]


def test_all_places_are_handed_on_to_who_needs_the_same() -> None:
    diary = Diary(*LEASED)
    asked: list[tuple[Take, str | None]] = [(ALL, key) for key in ("dense", "dense", "pruned", "pruned", None)]
    assert served(diary.places, asked, first=(ALL, "dense")) == [key for _, key in asked]
    assert [line for line in diary.read() if line.startswith("lease")] == ["lease a", "lease b"] * 3
    with diary.places.one() as place:
        assert place in LEASED


def test_one_place_is_not_handed_on_to_who_wants_all() -> None:
    diary = Diary(*LEASED)
    served(diary.places, [(ALL, "dense")], first=(ONE, "dense"))
    assert diary.read()[:3] == ["lease b", "evict b", "return b"]


def test_a_place_that_cannot_be_leased_leaves_the_others_free() -> None:
    broken = ["b"]

    @contextmanager
    def lease(name: str, wait: bool) -> Iterator[bool]:
        if name in broken:
            raise OSError(name)
        yield True

    places = DevicePool(LEASED, lease, lambda place: None)
    for take in (ALL, ONE):
        with pytest.raises(OSError, match="b"), take(places, "dense"):
            pass
    broken.clear()
    with places.all("dense") as place:
        assert place == LEASED[0]


def test_who_could_not_lease_all_hands_nothing_on() -> None:
    """Whoever waits behind, for the same checkpoint, leases everything itself."""
    held: list[str] = []
    waiting = threading.Event()

    @contextmanager
    def lease(name: str, wait: bool) -> Iterator[bool]:
        if name == "b" and not waiting.is_set():
            while not places._queue:
                time.sleep(0.001)
            waiting.set()
            raise OSError(name)
        held.append(name)
        yield True
        held.remove(name)

    places = DevicePool(LEASED, lease, lambda place: None)

    def behind() -> list[str]:
        while places._free:
            time.sleep(0.001)
        with places.all("dense"):
            return sorted(held)

    with ThreadPoolExecutor(1) as thread:
        leased = thread.submit(behind)
        with pytest.raises(OSError, match="b"), places.all("dense"):
            pass
        assert leased.result(timeout=10) == ["a", "b"]


def test_who_stops_waiting_as_a_place_is_handed_over_gives_it_back() -> None:
    diary = Diary(LEASED[0])
    gone = DeviceRequest("dense")
    with diary.places.one("dense"):
        diary.places._queue.append(gone)
    assert gone.grant is not None
    assert diary.read() == ["lease b"]
    diary.places._withdraw(gone)
    assert diary.read() == ["evict b", "return b"]
    with diary.places.one():
        pass


def test_idle_models_of_the_process_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[Placement] = []
    monkeypatch.setattr(pool("cpu"), "_evict", emptied.append)
    with pool("cpu").one("dense"):
        evict_idle_models()
        assert emptied == []
    evict_idle_models()
    assert emptied == [CPU]


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


@pytest.mark.parametrize(
    ("name", "value"), [(None, ""), ("PYTORCH_CUDA_ALLOC_CONF", "a:1"), ("PYTORCH_ALLOC_CONF", "b:1")]
)
def test_cudas_segments_may_grow_unless_the_user_says_something_else(
    name: str | None, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(each, "")  # so that what is set goes again afterwards
        monkeypatch.delenv(each)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    device_names("auto")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if name:
        monkeypatch.setenv(name, value)
    assert device_names("auto") == ("cuda:0",)
    expected = {None: "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": None}[name]
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


def test_a_label_tells_a_spread_model_from_one_on_a_single_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA A100")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert device_label("auto") == device_label("cuda:1") == "NVIDIA A100"
    assert device_label(BALANCED) == "4 x NVIDIA A100 (balanced)"


def test_a_label_is_the_hardware_not_the_setting() -> None:
    label = device_label("cpu")
    assert label.startswith("cpu ")
    assert "cores)" in label
    if not torch.cuda.is_available():
        assert device_label("auto") == device_label(BALANCED) == label


@pytest.mark.parametrize("driver", ["/proc/driver/nvidia", "/dev/kfd", "/dev/dxg", "/dev/nvidiactl", "/dev/nvgpu"])
@pytest.mark.parametrize("setting", ["auto", BALANCED])
def test_a_gpu_is_found_whatever_its_driver(setting: str, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm and WSL2 have no /proc/driver/nvidia, and neither have some containers."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "AMD Instinct MI300X")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == driver)
    assert device_label(setting) == "AMD Instinct MI300X"


def test_a_driver_without_a_device_changes_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    label = device_label("cpu")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert device_label("auto") == label


def test_a_label_needs_no_torch_on_a_machine_without_cuda() -> None:
    if any(Path(path).exists() for path in GPU_DRIVERS):
        pytest.skip("this machine has a GPU's driver")
    code = "import sys; from tasks.devices.placement import device_label; device_label('auto')"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
