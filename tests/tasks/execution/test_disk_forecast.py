"""What a stage will write is told before it starts, and refused if there is no room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infra.artifacts.inventory import folder_bytes
from infra.artifacts.store import ArtifactStore
from infra.errors import DiskFull
from infra.settings import Settings
from infra.sources.find import sources_from
from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.layerwise.capture import capture_statistics
from pruning.walk.options import WalkOptions
from tasks.calibration_data import CalibrationData
from tasks.execution.context import RunContext
from tasks.execution.disk_forecast import Forecast, Need, check_room
from tasks.execution.stage import run_stage
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
    recover = RecoverRequest(plugin="lora", config={"rank": 4}, checkpoint=prune.ref, sources=())
    evaluate = EvaluateRequest(plugin="perplexity", config={}, checkpoint=recover.ref, sources=())
    return {
        "import": imported, "calibrate": calibration, "capture": capture, "order": order, "prune": prune,
        "one-shot": PruneRequest(plugin="slimgpt", config={"sparsity": 0.5}, statistics=capture.ref, **walked),
        "recover": recover, "evaluate": evaluate,
        "train": PruneRequest(plugin="loraprune", config={"sparsity": 0.5, "rank": 4}, checkpoint=imported.ref),
    }  # fmt: skip


def test_needs_follow_from_the_inputs_made_or_not(run_context: RunContext, model: Path) -> None:
    forecast = Forecast(run_context.store, run_context.sources, run_context.settings)
    needs = {name: forecast.need(request) for name, request in requests(model).items()}
    weights = (model / "model.safetensors").stat().st_size
    assert weights * 0.9 < needs["import"].artifact < weights * 1.1 + 2**17
    assert needs["prune"].artifact == needs["recover"].artifact == needs["import"].artifact
    assert needs["prune"].scratch == 4 * (6 + 2) * 10 * 32 * 4
    assert needs["one-shot"].scratch == 0
    assert needs["capture"].artifact == 3 * 2 * (32**2 + 48**2) * 4
    assert needs["recover"].scratch > 0
    assert needs["evaluate"].total <= 2**20
    assert needs["train"].scratch > needs["recover"].scratch, "packed text, and what goes along with the adapters"
    assert needs["train"].artifact == needs["import"].artifact
    assert {name for name, need in needs.items() if need.scratch} == {"prune", "recover", "train"}


@pytest.mark.parametrize(
    ("num_heldout", "heads", "head_dim", "hidden", "ffn", "layers", "gib"),
    [(16, 32, 128, 4096, 11008, 32, 32.9), (0, 32, 128, 4096, 11008, 32, 16.45), (16, 16, 128, 1024, 3072, 28, 2.84)],
    ids=["llama-7b", "llama-7b without held-out samples", "qwen3-0.6b: heads wider than the hidden size"],
)
def test_a_capture_needs_what_it_writes(
    run_context: RunContext, tmp_path: Path, num_heldout: int, heads: int, head_dim: int, hidden: int, ffn: int,
    layers: int, gib: float,
) -> None:  # fmt: skip
    folder = tmp_path / "large"
    folder.mkdir()
    config = {
        "model_type": "qwen3", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "head_dim": head_dim,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.norm.weight": torch.ones(hidden)}, folder / "model.safetensors")
    forecast = Forecast(run_context.store, run_context.sources, run_context.settings)
    asked = requests(folder)
    forecast.need(asked["import"])
    forecast.need(asked["calibrate"].model_copy(update={"num_heldout": num_heldout}))
    calibration = asked["calibrate"].model_copy(update={"num_heldout": num_heldout})
    capture = CaptureRequest(checkpoint=asked["import"].ref, calibration=calibration.ref)
    assert forecast.need(capture).artifact / 2**30 == pytest.approx(gib, rel=0.005)


def test_an_allocation_that_measures_anew_keeps_streams_and_the_model_between(
    run_context: RunContext, model: Path
) -> None:
    asked = requests(model)
    settings = run_context.settings.model_copy(update={"activation_budget_gib": 0})

    def scratch(**config: Any) -> int:
        forecast = Forecast(run_context.store, run_context.sources, settings)
        imported, _ = forecast.need(asked["import"]), forecast.need(asked["calibrate"])
        request = PruneRequest(
            plugin="slimgpt", config={"sparsity": 0.5} | config,
            checkpoint=asked["import"].ref, calibration=asked["calibrate"].ref,
        )  # fmt: skip
        copies = int("steps" not in config and "allocation" in config)
        copies += 3 * (config.get("allocation") == "searched")  # five levels and a refit of half of the weights
        return forecast.need(request).scratch - copies * imported.artifact

    curve = scratch()
    assert scratch(allocation="knapsack") - curve == (3 + 3) * 6 * 10 * 32 * 4  # three layers, six samples of ten
    assert scratch(allocation="knapsack", steps=1, step_samples=2) - curve == (3 + 3) * 2 * 10 * 32 * 4
    assert scratch(allocation="searched", steps=1) == scratch(allocation="knapsack", steps=1)


def test_a_ranking_keeps_activations_in_files_beyond_the_budget_only(run_context: RunContext, model: Path) -> None:
    asked = requests(model)

    def scratch(method: str, budget: float | None, **config: Any) -> int:
        settings = run_context.settings.model_copy(update={"activation_budget_gib": budget})
        forecast = Forecast(run_context.store, run_context.sources, settings)
        for name in ("import", "calibrate"):
            forecast.need(asked[name])
        request = OrderRequest(
            plugin=method, config=config, checkpoint=asked["import"].ref, calibration=asked["calibrate"].ref
        )
        return forecast.need(request).scratch

    nearly_none = 2**-30  # one byte
    values = 32 * 4  # hidden size, bytes
    for method, config, streams in (
        ("llm_pruner", {}, (3 + 3) * 6 * 10), ("llm_pruner", {"num_samples": 2}, (3 + 3) * 2 * 10),
        ("llm_pruner", {"importance": "l1"}, 0), ("flap", {}, 6 * 6 * 10), ("random", {}, 0),
        ("shortened", {}, (3 + 1) * 6 * 10), ("shortened", {"seq_len": 5, "unit": "sub_layer"}, (6 + 1) * 6 * 5),
        ("shortened", {"criterion": "magnitude"}, 0),
    ):  # fmt: skip
        assert scratch(method, None, **config) == 0
        assert scratch(method, nearly_none, **config) == max(0, streams * values - 1), (method, config)


def test_a_capture_that_was_made_is_as_large_as_was_said(run_context: RunContext, tmp_path: Path) -> None:
    """Heads wider than the hidden size, held-out samples: the files of the walk itself."""
    model = tiny_model("qwen3")
    calibration = CalibrationSet(torch.randint(0, 64, (2, 8)), torch.randint(0, 64, (1, 8)), {})
    out = tmp_path / "capture"
    out.mkdir()
    capture_statistics(ResidentDecoder(model), calibration, out, WalkOptions(torch.device("cpu"), batch_size=2))
    widths = (model.config.num_attention_heads * model.config.head_dim, model.config.intermediate_size)
    assert widths[0] != model.config.hidden_size
    said = model.config.num_hidden_layers * 2 * sum(width**2 for width in widths) * 4
    assert said <= folder_bytes(out) <= said + 2**14


def test_a_float64_checkpoint_is_forecast(run_context: RunContext, tmp_path: Path) -> None:
    folder = tmp_path / "double"
    tiny_model("llama").double().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    request = ImportRequest(source={"content": "x"}, dtype="auto", model_id=str(folder))
    need = Forecast(run_context.store, run_context.sources, run_context.settings).need(request)
    assert need.artifact >= (folder / "model.safetensors").stat().st_size * 0.9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_needs_scratch_for_its_parameters_however_they_are_stored(
    run_context: RunContext, model: Path, dtype: str
) -> None:
    imported = ImportRequest(source={"content": "x"}, dtype=dtype, model_id=str(model))
    recover = RecoverRequest(plugin="cpt", config={"data": "c4"}, checkpoint=imported.ref, sources=())
    forecast = Forecast(run_context.store, run_context.sources, run_context.settings)
    forecast.need(imported)
    parameters = sum(each.numel() for each in tiny_model("llama").parameters())
    expected = recover.module.scratch_bytes(recover.typed_config, parameters, 3, 32, 48)
    assert expected <= forecast.need(recover).scratch <= 1.5 * expected, "a few bytes that are no weights are counted"


def test_an_unknown_input_needs_nothing(run_context: RunContext, model: Path) -> None:
    assert Forecast(run_context.store, run_context.sources, run_context.settings).need(
        requests(model)["prune"]
    ) == Need(0, 0)


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
