"""A stage makes its artifact once, whoever asks at the same time, and never hands on one that is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from infra.artifacts.store import ArtifactRef
from infra.errors import SourceInvalid
from infra.settings import Settings
from infra.sources.find import Sources
from tasks.devices import model_cache
from tasks.devices.placement import Placement
from tasks.devices.pool import DevicePool
from tasks.execution import stage
from tasks.execution.context import RunContext, StageContext, StageResult
from tasks.execution.stage import Devices, run_stage
from tasks.requests import CaptureRequest, ImportRequest
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

PROJECT = Path(__file__).parents[3]
REQUEST = CaptureRequest(
    checkpoint=ArtifactRef(kind="checkpoint", key="import-model-v1-0"),
    calibration=ArtifactRef(kind="calibration", key="calibrate-v1-0"),
)
#: what a second process runs: the same request, with a fill that notes that it ran and takes its time
_CHILD = """
import sys, time
from pathlib import Path
from infra.settings import load_settings
from infra.sources.find import Sources
from tasks.execution.stage import run_stage
from tasks.execution.context import RunContext
from tasks.requests import CaptureRequest

def fill(request, bench):
    with open(sys.argv[1], "a") as notes:
        notes.write("x")
    time.sleep(0.5)
    (bench.folder / "answer.txt").write_text("42")

settings, request = load_settings(), CaptureRequest.model_validate_json(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
run_stage(request, "child", RunContext(settings, Sources((), None, False, home=settings.home)), fill, devices="none")
"""


@pytest.fixture
def run_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunContext:
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    settings = Settings(device="cpu")
    return RunContext(settings, Sources((), None, False, home=settings.home))


def answer(request: CaptureRequest, context: StageContext) -> None:
    (context.folder / "answer.txt").write_text("42", encoding="utf-8")


def test_a_stage_makes_what_its_request_names(run_context: RunContext) -> None:
    made = run_stage(REQUEST, "capture", run_context, answer, devices="none")
    assert (made.ref, made.found) == (REQUEST.ref, False)
    manifest = run_context.store.manifest(made.ref)
    assert manifest.request == REQUEST.model_dump(mode="json")
    assert set(manifest.files) == {"answer.txt"}
    assert "torch" in manifest.versions


def test_what_the_store_has_is_found(run_context: RunContext) -> None:
    first = run_stage(REQUEST, "capture", run_context, answer, devices="none")
    second = run_stage(REQUEST, "capture", run_context, None, devices="none")
    assert (first.found, second.found) == (False, True)
    assert second.seconds == pytest.approx(first.seconds, abs=0.1)


@pytest.mark.parametrize("changed", [True, False])
def test_what_was_changed_while_a_stage_read_it_is_not_kept(
    changed: bool, run_context: RunContext, tmp_path: Path
) -> None:
    """The key was made of what the folder held when the run began."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    located = run_context.sources.find(str(weights.parent), "model")
    request = ImportRequest(source=located.identity, dtype="auto", model_id=str(weights.parent))

    def fill(request: ImportRequest, context: StageContext) -> None:
        content = bytearray(weights.read_bytes())
        content[-1] ^= changed
        weights.write_bytes(content)
        (context.folder / "model.safetensors").write_bytes(content)

    with pytest.raises(SourceInvalid, match="was changed while the run used it") if changed else nullcontext():
        run_stage(request, "import-model", run_context, fill, devices="none")
    assert run_context.store.has(request.ref) is not changed


def test_two_threads_make_it_once(run_context: RunContext) -> None:
    calls = []

    def slow(request: CaptureRequest, context: StageContext) -> None:
        calls.append(threading.get_ident())
        time.sleep(0.2)
        answer(request, context)

    with ThreadPoolExecutor(4) as threads:
        tries = [threads.submit(run_stage, REQUEST, "capture", run_context, slow, devices="none") for _ in range(4)]
    assert sorted(one.result().found for one in tries) == [False, True, True, True]
    assert len(calls) == 1


def test_two_processes_make_it_once(run_context: RunContext, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, notes, REQUEST.model_dump_json()], cwd=PROJECT, env=os.environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.communicate("go\n", timeout=60)
    assert [child.returncode for child in children] == [0, 0]
    assert notes.read_text() == "x"
    assert run_context.store.has(REQUEST.ref)


def test_what_fails_leaves_nothing(run_context: RunContext) -> None:
    def half(request: CaptureRequest, context: StageContext) -> None:
        answer(request, context)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run_stage(REQUEST, "capture", run_context, half, devices="none")
    assert not run_context.store.has(REQUEST.ref)
    assert not list(run_context.store.root.glob(".writing/*"))
    assert run_stage(REQUEST, "capture", run_context, answer, devices="none").found is False


def test_scratch_outlives_a_failure_and_not_a_success(run_context: RunContext) -> None:
    def resumable(request: CaptureRequest, context: StageContext) -> None:
        progress = context.store.scratch(context.ref) / "step"
        if not progress.exists():
            progress.touch()
            raise RuntimeError("killed")
        answer(request, context)

    with pytest.raises(RuntimeError, match="killed"):
        run_stage(REQUEST, "capture", run_context, resumable, devices="none")
    run_stage(REQUEST, "capture", run_context, resumable, devices="none")
    assert not (run_context.store.root / ".scratch" / REQUEST.ref.key).exists()


def test_a_stage_has_a_place_if_it_asked_for_one(run_context: RunContext) -> None:
    places: list[Placement] = []

    def placed(request: CaptureRequest, context: StageContext) -> None:
        places.append(context.place)
        answer(request, context)

    with pytest.raises(AssertionError, match="without devices"):
        run_stage(REQUEST, "capture", run_context, placed, devices="none")
    run_stage(REQUEST, "capture", run_context, placed, devices="one")
    assert places[0].device.type == "cpu"


@pytest.mark.parametrize("devices", ["all", "walk"])
def test_a_stage_on_all_devices_finds_all_of_them_empty(
    run_context: RunContext, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tuple(Placement(torch.device("cpu"), device_map=name) for name in ("first", "second"))
    monkeypatch.setattr(stage, "pool", lambda *setting: DevicePool(places))
    for place in places:
        model_cache._cached_on(place).models["dense"] = tiny_model("llama")
    kept: list[int] = []

    def alone(request: CaptureRequest, context: StageContext) -> None:
        kept.append(len(model_cache._cache))
        answer(request, context)

    settings = run_context.settings.model_copy(update={"walk_processes": 2})
    run_stage(REQUEST, "recover", RunContext(settings, run_context.sources), alone, devices=devices)
    assert kept == [0]


@pytest.mark.parametrize("devices", ["one", "walk", "evaluation"])
def test_a_stage_takes_one_device_where_no_more_processes_are_asked_for(
    run_context: RunContext, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tuple(Placement(torch.device("cpu"), device_map=name) for name in ("first", "second"))
    shared = DevicePool(places)
    monkeypatch.setattr(stage, "pool", lambda *setting: shared)
    free: list[int] = []

    def count(request: CaptureRequest, context: StageContext) -> None:
        free.append(len(shared._free))
        answer(request, context)

    run_stage(REQUEST, "capture", run_context, count, devices=devices)
    assert free == [1]


def test_a_failed_stage_keeps_nothing_when_its_device_is_given_back(
    run_context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error, which Prefect keeps, came through frames that hold the model."""
    held: list[weakref.ref[torch.nn.Module]] = []
    left: list[object] = []

    @contextmanager
    def lease(name: str, wait: bool) -> Iterator[bool]:
        try:
            yield True
        finally:
            left.extend(model() for model in held)

    def failing(request: CaptureRequest, context: StageContext) -> None:
        model = torch.nn.Linear(1, 1)
        held.append(weakref.ref(model))
        try:
            raise ValueError("first")
        except ValueError as error:
            raise RuntimeError("no more") from error

    place = Placement(torch.device("cpu"), accelerators=("fake",))
    monkeypatch.setattr(stage, "pool", lambda *setting: DevicePool((place,), lease))
    with pytest.raises(RuntimeError, match="no more"):
        run_stage(REQUEST, "capture", run_context, failing, devices="one")
    assert left == [None]


def test_a_reference_to_nothing_cannot_be_decoded(run_context: RunContext) -> None:
    """Prefect keeps a record of a stage; decoding it must fail when the artifact is gone, or it would be handed on."""
    record = run_stage(REQUEST, "capture", run_context, answer, devices="none").model_dump_json()
    assert StageResult.model_validate_json(record).ref == REQUEST.ref
    answer_file = run_context.store.path(REQUEST.ref) / "answer.txt"
    answer_file.write_text("4", encoding="utf-8")
    with pytest.raises(ValidationError, match="no longer in the store"):
        StageResult.model_validate_json(record)
    shutil.rmtree(answer_file.parent)
    with pytest.raises(ValidationError, match="no longer in the store"):
        StageResult.model_validate_json(record)
