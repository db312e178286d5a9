"""Who computes where, and who waits."""

from __future__ import annotations

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
from tasks.devices import turns
from tasks.devices.placement import BALANCED, Placement, device_label, device_names
from tasks.devices.pool import DevicePool, empty_idle_places, pool
from tasks.devices.turns import PATIENCE, DeviceRequest

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
    """A pool whose leases and whose letting go are written down in their order."""

    def __init__(self, *places: Placement) -> None:
        self.told: list[str] = []
        self.places = DevicePool(places, self.lease, self.let_go)

    @contextmanager
    def lease(self, name: str, wait: bool) -> Iterator[bool]:
        self.told.append(f"lease {name}")
        try:
            yield True
        finally:
            self.told.append(f"return {name}")

    def let_go(self, place: Placement) -> None:
        self.told.append(f"empty {', '.join(place.accelerators) or place.device}")

    def read(self) -> list[str]:
        told, self.told = self.told, []
        return told


def served(
    places: DevicePool, needs: list[str | None], *, take: Take = DevicePool.one, first: str | None = None
) -> list[str | None]:
    """In which order those who ask in this order, while all is taken, are served."""
    order: list[str | None] = []

    def work(key: str | None) -> None:
        with take(places, key):
            order.append(key)
            time.sleep(0.005)

    line = places if take is DevicePool.one else places._turns
    with ThreadPoolExecutor(len(needs)) as threads, take(places, first):
        for number, key in enumerate(needs, start=1):
            threads.submit(work, key)
            while len(line._queue) < number:
                time.sleep(0.001)
    return order


def test_suites_of_a_checkpoint_follow_one_another() -> None:
    asked = ["dense", None, "pruned", "dense", "tuned", "pruned", "dense", "tuned"]
    order = served(DevicePool(TWO[:1]), asked)
    assert order == ["dense"] * 3 + [None] + ["pruned"] * 2 + ["tuned"] * 2


def test_nobody_waits_for_ever() -> None:
    order = served(DevicePool(TWO[:1]), ["dense", None, *["dense"] * 20])
    assert order == [*["dense"] * (1 + PATIENCE), None, *["dense"] * (20 - PATIENCE)]


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


def test_what_stays_is_let_go_before_the_lease_is_given_back() -> None:
    diary = Diary(LEASED[0])
    with diary.places.one("dense"):
        assert diary.read() == ["lease b"]
    assert diary.read() == ["empty b", "return b"]
    with pytest.raises(RuntimeError), diary.places.one("dense"):
        raise RuntimeError
    assert diary.read() == ["lease b", "empty b", "return b"]
    assert not diary.places._loaded


def test_who_waits_for_what_is_loaded_gets_it_with_its_lease() -> None:
    diary = Diary(LEASED[0])
    assert served(diary.places, ["pruned", "dense", "dense"], first="dense") == ["dense", "dense", "pruned"]
    assert diary.read() == ["lease b", "empty b", "return b"] * 2


def test_a_slot_of_the_server_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect ends the thread that took a slot if the slot is lost, and no other."""
    diary = Diary(LEASED[0])
    monkeypatch.setattr(turns, "server_lease", diary.places._lease)
    assert served(diary.places, ["dense"], first="dense") == ["dense"]
    assert diary.read() == ["lease b", "empty b", "return b"] * 2


def test_on_the_cpu_it_stays_until_something_else_comes_or_nobody_does() -> None:
    diary = Diary(CPU)
    for needs in ("dense", "dense", "pruned"):
        with diary.places.one(needs):
            pass
    assert diary.read() == []
    with diary.places.one():
        assert diary.read() == ["empty cpu"]
    with diary.places.one("dense"):
        diary.places.empty()
        assert diary.read() == [], "it is used"
    for _ in range(2):
        diary.places.empty()
    assert diary.read() == ["empty cpu"]


def test_all_places_are_taken_empty_and_emptied_before_the_first_is_given_back() -> None:
    diary = Diary(*LEASED)
    with diary.places.all():
        assert diary.read() == ["lease a", "empty a", "lease b", "empty b"]
    emptied = diary.read()
    assert set(emptied[:2]) == {"empty a", "empty b"}
    assert [line for line in emptied if line.startswith("return")] == ["return b", "return a"]
    with diary.places.all("dense"):  # its model may be on the first one, nothing on the others
        assert diary.read() == ["lease a", "empty a", "lease b"]


def test_all_places_are_handed_on_to_who_needs_the_same() -> None:
    diary = Diary(*LEASED)
    asked = ["pruned", "dense", None, "pruned", "dense"]
    order = served(diary.places, asked, take=DevicePool.all, first="dense")
    assert order == ["dense", "dense", "pruned", "pruned", None]
    assert [line for line in diary.read() if line.startswith("lease")] == ["lease a", "lease b"] * 3
    with diary.places.one() as place:
        assert place in LEASED


def test_who_waits_for_all_is_not_passed_over_for_ever() -> None:
    places, order = DevicePool(TWO[:1], let_go=lambda place: None), []

    def work(needs: str | None) -> None:
        with places.one(needs):
            order.append(needs)

    def everything() -> None:
        with places.all():
            order.append("all")

    with ThreadPoolExecutor(30) as threads, places.one("dense"):
        threads.submit(everything)
        for number in range(1, 21):
            while len(places._queue) < number:
                time.sleep(0.001)
            threads.submit(work, "dense")
        while len(places._queue) < 21:
            time.sleep(0.001)
    assert order == [*["dense"] * PATIENCE, "all", *["dense"] * (20 - PATIENCE)]


def test_a_place_that_cannot_be_leased_leaves_the_others_free() -> None:
    broken = ["b"]

    @contextmanager
    def lease(name: str, wait: bool) -> Iterator[bool]:
        if name in broken:
            raise OSError(name)
        yield True

    places = DevicePool(LEASED, lease, lambda place: None)
    with pytest.raises(OSError, match="b"), places.all("dense"):
        pass
    broken.clear()
    with places.all("dense") as place:
        assert place == LEASED[0]


def test_who_stops_waiting_as_a_place_is_handed_over_gives_it_back() -> None:
    diary = Diary(LEASED[0])
    gone = DeviceRequest("dense")
    with diary.places.one("dense"):
        diary.places._queue.append(gone)
    assert gone.given is not None
    assert diary.read() == ["lease b"]
    diary.places._withdraw(gone)
    assert diary.read() == ["empty b", "return b"]
    with diary.places.one():
        pass


def test_idle_places_of_the_process_are_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[Placement] = []
    monkeypatch.setattr(pool("cpu"), "_let_go", emptied.append)
    with pool("cpu").one("dense"):
        empty_idle_places()
        assert emptied == []
    empty_idle_places()
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


def test_a_label_needs_no_torch_on_a_machine_without_cuda() -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has an NVIDIA driver")
    code = "import sys; from tasks.devices.placement import device_label; device_label('auto')"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
