"""What is and what is not in the identity of a stage."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from infra.artifacts.store import ArtifactRef
from infra.keys import stage_key
from tasks.calibration_data import CalibrationData, Template
from tasks.requests import CalibrateRequest, EvaluateRequest, ImportRequest, ProfileRequest, PruneRequest, Request

CHECKPOINT = ArtifactRef(kind="checkpoint", key="import-model-v1-0")
CALIBRATION = ArtifactRef(kind="calibration", key="calibrate-v1-0")
IMPORT = ImportRequest(source={"content": "a"}, dtype="auto", model_id="a/b", revision=None)
CALIBRATE = CalibrateRequest(
    checkpoint=CHECKPOINT,
    source={"content": "a"},
    config=None,
    split="train",
    text_field="text",
    data_files=None,
    num_samples=1,
    seq_len=2,
    num_heldout=0,
    seed=0,
    join=" ",
    data=CalibrationData(dataset="a/b"),
)
PRUNE = PruneRequest(plugin="slimgpt", config={"sparsity": 0.2}, checkpoint=CHECKPOINT, calibration=CALIBRATION)
PROFILE = ProfileRequest(checkpoint=CHECKPOINT, reference=None, settings={}, device_name="a")


@pytest.mark.parametrize(
    "request_, change",
    [
        (IMPORT, {"source": {"content": "b"}}),
        (IMPORT, {"dtype": "float32"}),
        (IMPORT, {"trust_remote_code": True}),
        (CALIBRATE, {"checkpoint": ArtifactRef(kind="checkpoint", key="import-model-v1-1")}),
        (CALIBRATE, {"source": {"content": "b"}}),
        (CALIBRATE, {"config": "x"}),
        (CALIBRATE, {"split": "test"}),
        (CALIBRATE, {"text_field": "x"}),
        (CALIBRATE, {"data_files": "x"}),
        (CALIBRATE, {"num_samples": 2}),
        (CALIBRATE, {"seq_len": 3}),
        (CALIBRATE, {"num_heldout": 1}),
        (CALIBRATE, {"seed": 1}),
        (CALIBRATE, {"join": ""}),
        (CALIBRATE, {"rows": "lines"}),
        (CALIBRATE, {"template": Template()}),
        (CALIBRATE.model_copy(update={"template": Template()}), {"template": Template(instruction="question")}),
        (CALIBRATE.model_copy(update={"template": Template()}), {"template": Template(input=None)}),
        (PRUNE, {"config": {"sparsity": 0.3}}),
        (PRUNE, {"statistics": ArtifactRef(kind="statistics", key="capture-v1-0")}),
        (PROFILE, {"reference": CHECKPOINT}),
        (PROFILE, {"settings": {"runs": 2}}),
        (PROFILE, {"device_name": "b"}),
    ],
)
def test_what_changes_the_answer_changes_the_key(request_: Request, change: dict[str, Any]) -> None:
    assert request_.model_copy(update=change).ref != request_.ref


@pytest.mark.parametrize(
    "request_, change",
    [
        (IMPORT, {"model_id": "/elsewhere/b"}),
        (IMPORT, {"revision": "main"}),
        (CALIBRATE, {"data": CalibrationData(dataset="/elsewhere")}),
    ],
)
def test_where_it_is_found_does_not(request_: Request, change: dict[str, Any]) -> None:
    assert request_.model_copy(update=change).ref == request_.ref


def test_plain_text_keeps_the_keys_of_the_time_before_templates() -> None:
    before = {
        "checkpoint": {"kind": "checkpoint", "key": "import-model-v1-0"},
        "source": {"content": "a"},
        "config": None,
        "split": "train",
        "text_field": "text",
        "data_files": None,
        "num_samples": 1,
        "seq_len": 2,
        "num_heldout": 0,
        "seed": 0,
        "join": " ",
    }
    assert CALIBRATE.ref.key == stage_key("calibrate", 1, before)
    assert CalibrateRequest.model_validate(before | {"data": {"dataset": "a/b"}}) == CALIBRATE


def test_a_request_names_what_it_reads() -> None:
    assert IMPORT.inputs == ()
    assert CALIBRATE.inputs == (CHECKPOINT,)
    assert PRUNE.inputs == (CHECKPOINT, CALIBRATION)
    assert PROFILE.inputs == (CHECKPOINT,)


def test_a_pruning_that_trains_is_its_data_and_no_calibration() -> None:
    sources = ({"commit": "a"},)
    trained = PruneRequest(plugin="loraprune", config={"sparsity": 0.2}, checkpoint=CHECKPOINT, sources=sources)
    assert trained.trains
    assert trained.inputs == (CHECKPOINT,)
    assert trained.origins == sources
    assert "calibration" not in trained.model_dump()
    assert trained.ref != trained.model_copy(update={"sources": ({"commit": "b"},)}).ref
    assert PruneRequest.model_validate_json(trained.model_dump_json()) == trained
    assert not PRUNE.trains
    assert PRUNE.origins == ()
    assert set(PRUNE.model_dump()) == {"plugin", "config", "checkpoint", "calibration", "statistics", "orders"}


def test_a_request_survives_json_and_refuses_the_unknown() -> None:
    assert PruneRequest.model_validate_json(PRUNE.model_dump_json()) == PRUNE
    with pytest.raises(ValidationError, match="surprise"):
        PruneRequest.model_validate(PRUNE.model_dump() | {"surprise": 1})


def test_a_plugin_gets_its_own_config_back() -> None:
    assert PRUNE.typed_config.sparsity == 0.2
    request = EvaluateRequest(plugin="zero_shot", config={"tasks": ["piqa"]}, checkpoint=CHECKPOINT, sources=())
    assert request.typed_config.tasks == ("piqa",)
    assert request.ref.key.startswith(f"evaluate-zero-shot-v{request.module.VERSION}-")


def test_a_smaller_vocabulary_is_its_corpus_and_no_calibration() -> None:
    smaller = PruneRequest(plugin="vocabulary", config={"sparsity": 0.2}, checkpoint=CHECKPOINT, sources=({"a": "b"},))
    assert smaller.rebuilds_vocabulary
    assert not smaller.trains
    assert not PRUNE.rebuilds_vocabulary
    assert smaller.ref.key.startswith("prune-vocabulary-v1-")
    assert set(smaller.model_dump()) == {"plugin", "config", "checkpoint", "statistics", "orders", "sources"}
