"""Models stay loaded from one measurement of a checkpoint to the next, and go when something else needs the device."""

from __future__ import annotations

import gc
import os
import signal
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import pruning.checkpoints.save_load
from infra.artifacts.store import ArtifactRef, ArtifactStore
from pruning.checkpoints.save_load import save_checkpoint
from tasks.devices.model_cache import cached_replicas, evict, load_cached
from tasks.devices.placement import Placement
from tasks.devices.pool import DevicePool
from tests.infra.processes import finish, kill_after_line, start
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

#: keeps a replica, says which process that is, and ends without a word about it
_KEEPER = """
import sys, time
from pathlib import Path
import torch
from infra.artifacts.store import ArtifactRef, ArtifactStore
from tasks.devices.model_cache import cached_replicas
from tasks.devices.placement import Placement
here, dense = Placement(torch.device("cpu")), ArtifactRef(kind="checkpoint", key=sys.argv[3])
with cached_replicas(dense, ArtifactStore(Path(sys.argv[1])), here, [{"device": "cpu"}]) as replicas:
    print(replicas._processes[0][0].pid, flush=True)
time.sleep(float(sys.argv[2]))
"""
HERE, THERE = Placement(torch.device("cpu")), Placement(torch.device("cpu"), accelerators=("another",))
DENSE, PRUNED = (ArtifactRef(kind="checkpoint", key=f"checkpoint-v1-{digit * 16}") for digit in "ab")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path)
    for seed, ref in enumerate((DENSE, PRUNED)):
        with store.writing(ref, request={}, versions={}) as folder:
            save_checkpoint(tiny_model("llama", seed=seed), None, folder)
    return store


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    evict()
    yield
    evict()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    load = pruning.checkpoints.save_load.load_checkpoint

    def noted(folder: Path, **where: Any) -> Any:
        names.append(folder.name)
        return load(folder, **where)

    monkeypatch.setattr(pruning.checkpoints.save_load, "load_checkpoint", noted)
    return names


def test_the_same_checkpoint_is_loaded_once(store: ArtifactStore, loads: list[str]) -> None:
    (first,) = load_cached([DENSE], store, HERE)
    (second,) = load_cached([DENSE], store, HERE)
    assert first is second
    assert not first.training
    assert loads == [DENSE.key]


def test_another_checkpoint_takes_its_place_and_both_may_be_asked_for(store: ArtifactStore, loads: list[str]) -> None:
    (dense,) = load_cached([DENSE], store, HERE)
    pruned, same = load_cached([PRUNED, DENSE], store, HERE)
    assert same is dense
    assert load_cached([PRUNED], store, HERE) == (pruned,)
    load_cached([DENSE], store, HERE)
    assert loads == [DENSE.key, PRUNED.key, DENSE.key]


def test_suites_in_the_order_of_their_checkpoints_load_each_checkpoint_once(
    store: ArtifactStore, loads: list[str]
) -> None:
    places = DevicePool((HERE,))

    def measure(ref: ArtifactRef) -> None:
        with places.one(ref.key) as place:
            load_cached([ref], store, place)
            time.sleep(0.005)

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(measure, ref) for ref in [DENSE] * 4 + [PRUNED] * 4]:
            future.result(timeout=10)
    assert sorted(loads) == [DENSE.key, PRUNED.key]


def test_each_device_has_its_own(store: ArtifactStore, loads: list[str]) -> None:
    assert load_cached([DENSE], store, HERE)[0] is not load_cached([DENSE], store, THERE)[0]


def test_what_is_forgotten_is_freed(store: ArtifactStore, loads: list[str]) -> None:
    gone = weakref.ref(load_cached([DENSE], store, HERE)[0])
    kept = weakref.ref(load_cached([DENSE], store, THERE)[0])
    evict(HERE)
    gc.collect()
    assert gone() is None
    assert kept() is not None
    evict()
    gc.collect()
    assert kept() is None


def process(store: ArtifactStore, ref: ArtifactRef = DENSE, devices: tuple[str, ...] = ("cpu",)) -> Any:
    """The first process of the replicas that a suite would get."""
    with cached_replicas(ref, store, HERE, [{"device": name} for name in devices]) as replicas:
        return replicas._processes[0][0]


def test_replicas_are_started_once_for_a_checkpoint(store: ArtifactStore) -> None:
    first = process(store)
    load_cached([DENSE, PRUNED], store, HERE)
    load_cached([DENSE], store, HERE)
    assert process(store) is first
    other = process(store, devices=("cpu", "cpu"))
    assert not first.is_alive()
    load_cached([PRUNED, DENSE], store, HERE)
    assert not other.is_alive(), "it had copies of another one"
    third = process(store, PRUNED)
    evict(HERE)
    assert not third.is_alive()


def test_replicas_that_lost_a_process_or_failed_are_not_used_again(store: ArtifactStore) -> None:
    first = process(store)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second = process(store)
    assert second.is_alive()
    with pytest.raises(RuntimeError), cached_replicas(DENSE, store, HERE, [{"device": "cpu"}]):
        raise RuntimeError
    assert not second.is_alive()


def gone(pid: int) -> bool:
    """Whether the process ends soon."""
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # an orphan in a container without an init
        time.sleep(0.05)
    return False


def test_no_process_of_replicas_is_left_behind(store: ArtifactStore) -> None:
    assert gone(int(finish(start(_KEEPER, store.root, 0, DENSE.key))))
    assert gone(int(kill_after_line(start(_KEEPER, store.root, 60, DENSE.key))))
