"""Models stay loaded from one measurement of a checkpoint to the next, and go when something else needs the device."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import pruning.checkpoint
from infra.artifacts import ArtifactRef, ArtifactStore
from pruning.checkpoint import save_checkpoint
from tasks.devices import DevicePool, Placement
from tasks.loaded import forget, load_kept
from tests.tiny import tiny_model

HERE, THERE = Placement(torch.device("cpu")), Placement(torch.device("cpu"), accelerators=("another",))
DENSE, PRUNED = (ArtifactRef(kind="checkpoint", key=f"checkpoint-v1-{digit * 16}") for digit in "ab")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path)
    for seed, ref in enumerate((DENSE, PRUNED)):
        with store.writing(ref, request={}, versions={}) as folder:
            save_checkpoint(tiny_model("llama", seed=seed), None, folder)
    return store


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []
    load = pruning.checkpoint.load_checkpoint

    def noted(folder: Path, **where: Any) -> Any:
        names.append(folder.name)
        return load(folder, **where)

    monkeypatch.setattr(pruning.checkpoint, "load_checkpoint", noted)
    forget()
    yield names
    forget()


def test_the_same_checkpoint_is_loaded_once(store: ArtifactStore, loads: list[str]) -> None:
    (first,) = load_kept([DENSE], store, HERE)
    (second,) = load_kept([DENSE], store, HERE)
    assert first is second
    assert not first.training
    assert loads == [DENSE.key]


def test_another_checkpoint_takes_its_place_and_both_may_be_asked_for(store: ArtifactStore, loads: list[str]) -> None:
    (dense,) = load_kept([DENSE], store, HERE)
    pruned, same = load_kept([PRUNED, DENSE], store, HERE)
    assert same is dense
    assert load_kept([PRUNED], store, HERE) == (pruned,)
    load_kept([DENSE], store, HERE)
    assert loads == [DENSE.key, PRUNED.key, DENSE.key]


def test_side_by_side_suites_load_each_checkpoint_once(store: ArtifactStore, loads: list[str]) -> None:
    places = DevicePool((HERE,))

    def measure(ref: ArtifactRef) -> None:
        with places.one(ref.key) as place:
            load_kept([ref], store, place)
            time.sleep(0.005)

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(measure, ref) for ref in [DENSE, PRUNED] * 4]:
            future.result(timeout=10)
    assert sorted(loads) == [DENSE.key, PRUNED.key]


def test_each_device_has_its_own(store: ArtifactStore, loads: list[str]) -> None:
    assert load_kept([DENSE], store, HERE)[0] is not load_kept([DENSE], store, THERE)[0]


def test_what_is_forgotten_is_freed(store: ArtifactStore, loads: list[str]) -> None:
    gone = weakref.ref(load_kept([DENSE], store, HERE)[0])
    kept = weakref.ref(load_kept([DENSE], store, THERE)[0])
    forget(HERE)
    gc.collect()
    assert gone() is None
    assert kept() is not None
    forget()
    gc.collect()
    assert kept() is None
