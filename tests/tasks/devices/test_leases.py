"""An accelerator is never given to two stages, whichever processes they are in, and is free when its holder dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from infra.errors import LeaseUnusable, SettingsInvalid
from infra.filesystem import locks
from infra.filesystem.locks import leased
from infra.settings import Settings
from tasks.devices.leases import check_lease, server_lease
from tasks.devices.placement import Placement
from tasks.devices.pool import DevicePool
from tests.infra.processes import finish, kill_after_line, start

pytestmark = pytest.mark.slow  # not in `make test-fast`

TWO = tuple(Placement(torch.device(f"cuda:{index}"), accelerators=(f"fake-{index}",)) for index in range(2))
#: stages on two pretended accelerators; each marks its device with a file that must not be there yet
_CHILD = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from infra.filesystem import locks
from infra.artifacts.store import ArtifactRef
from infra.settings import load_settings
from infra.sources.find import Sources
from tasks.execution import stage
from tasks.execution.context import RunContext
from tasks.requests import CaptureRequest
from tests.tasks.devices.test_leases import TWO, DevicePool

locks.LEASES = Path(sys.argv[1])
places = DevicePool(TWO if sys.argv[3] == "forward" else TWO[::-1])
stage.pool = lambda *setting: places
settings = load_settings()
run_context = RunContext(settings, Sources((), None, False, home=settings.home))

def mark(name):
    path = Path(sys.argv[2]) / name
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    return path

def fill(request, context):
    names = [mark(place.accelerators[0]) for place in TWO if request.num_devices == 2 or place == context.place]
    time.sleep(0.02)
    for name in names:
        name.unlink()
    (context.folder / "answer.txt").write_text("42")

class Numbered(CaptureRequest):
    number: str
    num_devices: int

def run(number):
    ref = ArtifactRef(kind="checkpoint", key="import-model-v1-0")
    every = number % 3 == 0
    request = Numbered(
        checkpoint=ref, calibration=ref, number=f"{os.getpid()}-{number}", num_devices=2 if every else 1
    )
    stage.run_stage(request, str(number), run_context, fill, devices="all" if every else "one")

print("ready", flush=True)
with ThreadPoolExecutor(4) as threads:
    print(len(list(threads.map(run, range(9)))))
"""
_HOLDER = """
import sys, time
from pathlib import Path
from infra.filesystem import locks
from tests.tasks.devices.test_leases import TWO, DevicePool
locks.LEASES = Path(sys.argv[1])
with DevicePool(TWO[:1]).one():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(locks, "LEASES", tmp_path / "leases")
    return tmp_path / "leases"


def test_stages_of_two_processes_are_never_on_one_accelerator(folder: Path, tmp_path: Path) -> None:
    """Those that take both devices included, in whatever order each process counts them."""
    marks = tmp_path / "marks"
    marks.mkdir()
    children = [start(_CHILD, folder, marks, order) for order in ("forward", "backward")]
    assert [finish(child).split() for child in children] == [["ready", "9"], ["ready", "9"]]
    assert not list(marks.iterdir())


def test_a_device_that_is_free_on_the_host_is_preferred(folder: Path) -> None:
    with leased("fake-0"), ThreadPoolExecutor(1) as thread:

        def take() -> Placement:
            with DevicePool(TWO).one() as place:
                return place

        assert thread.submit(take).result(timeout=5) == TWO[1]


def test_who_finds_none_free_waits_for_the_first(folder: Path) -> None:
    def wait() -> Placement:
        with DevicePool(TWO).one() as place:
            return place

    with ThreadPoolExecutor(1) as thread, leased("fake-0"):
        with leased("fake-1"):
            waiting = thread.submit(wait)
            time.sleep(0.1)
            assert not waiting.done()
        assert waiting.result(timeout=5) == TWO[1]


def test_kill_9_frees_the_device_at_once(folder: Path) -> None:
    holder = start(_HOLDER, folder)
    assert holder.stdout is not None
    assert kill_after_line(holder) == "held"
    started = time.monotonic()
    with DevicePool(TWO[:1]).one():
        assert time.monotonic() - started < 0.5


def test_the_cpu_is_shared(folder: Path) -> None:
    cpu = Placement(torch.device("cpu"))
    with DevicePool((cpu,)).one(), DevicePool((cpu,)).one():
        assert not folder.exists()


def test_every_user_may_lease(folder: Path) -> None:
    with leased("cuda-GPU/1"):
        (file,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o7777, file.stat().st_mode & 0o777) == (0o1777, 0o666)
    assert file.name == "cuda-GPU_1.lock"


def test_a_folder_that_is_none_is_named(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(LeaseUnusable, match=str(folder)), leased("fake-0"):
        pass


def test_a_server_grants_a_device_once(prefect_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two containers with a /tmp of their own agree through the server; the limit is made where it is missing."""
    with server_lease("fake-server", False) as ours:
        assert ours
        monkeypatch.setattr(locks, "LEASES", tmp_path / "other-container")
        with server_lease("fake-server", False) as theirs:
            assert not theirs
    with server_lease("fake-server", True) as ours:
        assert ours


def test_a_server_of_ones_own_is_no_server_for_all() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        check_lease(Settings())
        with pytest.raises(SettingsInvalid, match="set PREFECT_API_URL"):
            check_lease(Settings(device_lease="server"))
