"""What a stage will write is told before it starts, and refused if there is no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.artifacts.inventory import folder_bytes
from infra.artifacts.store import ArtifactStore
from infra.errors import DiskFull
from infra.settings import Settings
from infra.sources.find import sources_from
from tasks.calibration_data import CalibrationData
from tasks.execution.disk_forecast import Forecast, Need, check_room
from tasks.execution.stage import RunContext, run_stage
from tasks.requests import (
    CalibrateRequest,
    CaptureRequest,
    EvaluateRequest,
    ImportRequest,
    OrderRequest,
    PruneRequest,
    RecoverRequest,
    Request,
)
from tests.tiny import tiny_model


@pytest.fixture
def run_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunContext:
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    settings = Settings(device="cpu")
    return RunContext(settings, sources_from(None, settings))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def requests(model: Path) -> dict[str, Request]:
    data = CalibrationData(dataset="some/texts")
    imported = ImportRequest(source={"content": "x"}, dtype="float32", model_id=str(model))
    calibration = CalibrateRequest(
        checkpoint=imported.ref, source={}, config=None, split="train", text_field="text", data_files=None,
        num_samples=6, seq_len=10, num_heldout=2, seed=0, join="", data=data,
    )  # fmt: skip
    walked = {"checkpoint": imported.ref, "calibration": calibration.ref}
    capture = CaptureRequest(**walked)
    order = OrderRequest(plugin="slimgpt", config={}, checkpoint=imported.ref, statistics=capture.ref)
    prune = PruneRequest(plugin="slimgpt", config={"sparsity": 0.5}, **walked)
    recover = RecoverRequest(plugin="lora", config={"rank": 4}, checkpoint=prune.ref, source={})
    evaluate = EvaluateRequest(plugin="perplexity", config={}, checkpoint=recover.ref, sources=())
    return {
        "import": imported, "calibrate": calibration, "capture": capture, "order": order, "prune": prune,
        "one-shot": PruneRequest(plugin="slimgpt", config={"sparsity": 0.5}, statistics=capture.ref, **walked),
        "recover": recover, "evaluate": evaluate,
    }  # fmt: skip


def test_needs_follow_from_the_inputs_made_or_not(run_context: RunContext, model: Path) -> None:
    forecast = Forecast(run_context.store, run_context.sources)
    needs = {name: forecast.need(request) for name, request in requests(model).items()}
    weights = (model / "model.safetensors").stat().st_size
    assert weights * 0.9 < needs["import"].artifact < weights * 1.1 + 2**17
    assert needs["prune"].artifact == needs["recover"].artifact == needs["import"].artifact
    assert needs["prune"].scratch == 4 * (6 + 2) * 10 * 32 * 4
    assert needs["one-shot"].scratch == 0
    assert needs["capture"].artifact >= 3 * (32**2 + 48**2) * 4
    assert needs["recover"].scratch > 0
    assert needs["evaluate"].total <= 2**20
    assert {name for name, need in needs.items() if need.scratch} == {"prune", "recover"}


def test_an_unknown_input_needs_nothing(run_context: RunContext, model: Path) -> None:
    assert Forecast(run_context.store, run_context.sources).need(requests(model)["prune"]) == Need(0, 0)


def test_a_stage_is_refused_before_it_starts(run_context: RunContext, model: Path) -> None:
    tight = RunContext(Settings(device="cpu", disk_budget_gib=1e-5), run_context.sources)
    request = requests(model)["import"]
    with pytest.raises(DiskFull) as caught:
        run_stage(request, "import-model", tight, None, devices="none")
    sentence = str(caught.value)
    assert sentence.startswith("stage import-model needs about ")
    assert "SLIMLINE_DISK_BUDGET_GIB=1e-05" in sentence
    assert "slimline gc" in sentence
    assert not tight.store.has(request.ref)


def test_the_disk_itself_is_asked(run_context: RunContext) -> None:
    store = run_context.store
    with pytest.raises(DiskFull, match=r"x needs about .* GiB to keep, .* SLIMLINE_HOME"):
        check_room("x", Need(2**60), store, run_context.settings)
    check_room("x", Need(1000), store, run_context.settings)


def test_what_lies_there_already_is_not_counted_again(tmp_path: Path, model: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    request = requests(model)["prune"]
    there = store.scratch(request.ref)
    (there / "layers").write_bytes(bytes(2**20))
    assert folder_bytes(there) == 2**20
    settings = Settings(disk_budget_gib=1.5 * 2**20 / 2**30)
    check_room("x", Need(2**20, 2**19 - 1), store, settings, requests=[request])
    with pytest.raises(DiskFull, match="budget"):
        check_room("x", Need(2**20, 2**19 + 1), store, settings, requests=[request])
