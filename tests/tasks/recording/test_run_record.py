"""What a run is in MLflow: names, parameters, data, descriptions and aliases of its checkpoints, without mlflow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.results.rows import LayerRow, MetricRow, StageRow
from infra.tracking.records import RunRecord
from tasks.recording.best import aliases
from tasks.recording.description import MOST_CHARACTERS, checkpoint_description, run_description
from tasks.recording.lineage import Lineage, lineage_of
from tasks.recording.outcome import Measured, RunOutcome
from tasks.recording.run_record import Rows, metric_name, run_record

KEY = "run-demo-v1-0"
C4 = {"repo_id": "allenai/c4", "content": "c" * 64}
WIKI = {"repo_id": "Salesforce/wikitext", "revision": "r" * 40}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def make(store: ArtifactStore, kind: str, key: str, request: Mapping[str, Any], **files: str) -> ArtifactRef:
    ref = ArtifactRef.model_validate({"kind": kind, "key": key})
    with store.writing(ref, request=request, versions={"torch": "2"}) as folder:
        for name, text in (files or {"x": "x"}).items():
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return ref


def plain(ref: ArtifactRef) -> dict[str, str]:
    return dict(ref.model_dump())


@pytest.fixture
def checkpoints(store: ArtifactStore) -> dict[str, ArtifactRef]:
    dense = make(store, "checkpoint", "import-model-v2-0", {"source": {"repo_id": "m", "content": "0"}})
    asked = {"source": C4, "config": "en", "split": "train", "num_samples": 32, "seq_len": 512, "seed": 0}
    windows = make(store, "calibration", "calibrate-v1-0", {"checkpoint": plain(dense), **asked})
    options = {"sparsity": 0.2, "split": "ffn"}
    pruning = {"plugin": "slimgpt", "config": options, "checkpoint": plain(dense), "calibration": plain(windows)}
    pruned = make(store, "checkpoint", "prune-slimgpt-v2-0", pruning, plan="{}")
    training = {"plugin": "lora", "config": {}, "checkpoint": plain(pruned), "sources": [WIKI, {"content": "9"}]}
    trained = make(store, "checkpoint", "recover-lora-v2-0", training, recovery="{}")
    return {"dense": dense, "slimgpt-20": pruned, "slimgpt-20+lora": trained}


def row(checkpoint: str, value: float, metric: str = "ppl@2048", **changes: Any) -> MetricRow:
    fields: dict[str, Any] = {
        "run_key": KEY,
        "checkpoint": checkpoint,
        "checkpoint_key": "prune-v1-0",
        "stage_key": "evaluate-v1-0",
        "suite": "perplexity",
        "task": "wikitext2",
        "metric": metric,
        "value": value,
        "protocol": "{}",
        "higher_is_better": metric == "acc",
    }
    return MetricRow(**fields | changes)


def recorded(store: ArtifactStore, checkpoints: Mapping[str, ArtifactRef], **changes: Any) -> RunRecord:
    report = make(
        store, "report", "evaluate-perplexity-v3-0", {"sources": [C4], "config": {"split": "test"}}, report="{}"
    )
    measured = Measured(
        report=report, suite="perplexity", label="perplexity", checkpoint_name="dense", checkpoint=checkpoints["dense"]
    )
    fields: dict[str, Any] = {
        "run_key": KEY,
        "name": "demo",
        "spec": {"model": {"id": "org/m"}, "description": "try <b>"},
        "started_at": datetime(2025, 6, 1, tzinfo=UTC),
        "stages": (),
        "checkpoints": dict(checkpoints),
        "measured": (measured,),
        "failed": False,
        "message": None,
    }
    metrics = [row("dense", 12.5), row("slimgpt-20", math.inf), row("slimgpt-20+lora", 20.25)]
    layer = LayerRow(
        run_key=KEY,
        stage_key="prune-slimgpt-v2-0",
        layer=3,
        sub_layer="mlp",
        kept=1,
        total=2,
        sparsity=0.5,
        measured_error=0.25,
    )
    return run_record(RunOutcome(**fields | changes), Rows(metrics, [layer], [], ""), store)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "perplexity/wikitext2/ppl@2048"),
        ({"suite": "profile", "task": "profile", "metric": "num_parameters"}, "size/num_parameters"),
        ({"suite": "profile", "task": "profile", "metric": "tokens_per_s"}, "profile/tokens_per_s"),
        ({"suite": "profile", "task": "profile b4 p8 n2", "metric": "power_w"}, "profile/b4_p8_n2/power_w"),
    ],
)
def test_names_of_metrics_hold_no_checkpoint(changes: dict[str, str], name: str) -> None:
    assert metric_name(row("slimgpt-20", 1.0, **changes)) == name


def test_short_params_of_every_checkpoint(store: ArtifactStore, checkpoints: dict[str, ArtifactRef]) -> None:
    record = recorded(store, checkpoints)
    params = {each.label: each.content.params for each in record.checkpoints}
    calibration = "allenai/c4 32x512 seed 0"
    pruned = {"model": "org/m", "method": "slimgpt", "sparsity": "0.2", "split": "ffn", "calibration": calibration}
    assert params == {
        "dense": dict.fromkeys(pruned, "none") | {"model": "org/m", "sparsity": "0", "recovery": "none"},
        "slimgpt-20": pruned | {"recovery": "none"},
        "slimgpt-20+lora": pruned | {"recovery": "lora"},
    }
    assert record.content.params["method"] == "none, slimgpt"
    assert record.content.params["recovery"] == "none, lora"


def test_data_sets_that_were_read(store: ArtifactStore, checkpoints: dict[str, ArtifactRef]) -> None:
    record = recorded(store, checkpoints)
    dense, pruned, trained = (each.content.inputs for each in record.checkpoints)
    assert [(each.name, each.context, each.hub["split"]) for each in dense] == [("allenai/c4", "evaluation", "test")]
    assert [(each.digest, each.context) for each in pruned] == [("c" * 64, "calibration")]
    assert pruned[0].hub == {"path": "allenai/c4", "config_name": "en", "split": "train"}
    assert [(each.name, each.digest, each.context) for each in trained] == [
        ("allenai/c4", "c" * 64, "calibration"),
        ("Salesforce/wikitext", "r" * 40, "training"),
        ("local data", "9", "training"),
    ]
    assert len(record.content.inputs) == 5


def test_layers_are_steps_of_the_checkpoint_that_was_pruned(
    store: ArtifactStore, checkpoints: dict[str, ArtifactRef]
) -> None:
    _, pruned, trained = recorded(store, checkpoints).checkpoints
    assert [(point.key, point.value, point.step) for point in pruned.content.metrics] == [
        ("perplexity/wikitext2/ppl@2048", math.inf, 0),
        ("layers/mlp_error", 0.25, 3),
    ]
    assert [point.key for point in trained.content.metrics] == ["perplexity/wikitext2/ppl@2048"]
    assert set(pruned.content.artifacts) == {"plan.json", "steps.json"}
    assert list(pruned.content.images) == ["figures/kept.png"]
    assert not trained.content.images, "it has no plan of its own here, and no curves"
    assert [step["plugin"] for step in json.loads(trained.content.artifacts["steps.json"])] == ["slimgpt", "lora"]


def test_moments_are_of_the_stages_that_the_run_ran(store: ArtifactStore, checkpoints: dict[str, ArtifactRef]) -> None:
    made = store.manifest(checkpoints["dense"])
    first, *_ = recorded(store, checkpoints).checkpoints
    began = int((made.created_at - timedelta(seconds=made.seconds)).timestamp() * 1000)
    report = store.manifest(ArtifactRef(kind="report", key="evaluate-perplexity-v3-0"))
    assert (first.content.began_ms, first.content.ended_ms) == (began, int(report.created_at.timestamp() * 1000))
    ran = StageRow(run_key=KEY, name="import-model", stage_key=made.ref.key, kind="checkpoint", status="completed")
    first, *_ = recorded(store, checkpoints, stages=(ran,)).checkpoints
    assert first.content.ended_ms == int(made.created_at.timestamp() * 1000)
    (moment,) = json.loads(recorded(store, checkpoints, stages=(ran,)).content.artifacts["stages.json"])
    assert (moment["name"], moment["ended_at"]) == ("import-model", made.created_at.isoformat())


def test_a_stage_without_artifact_has_no_moments(store: ArtifactStore, checkpoints: dict[str, ArtifactRef]) -> None:
    failed = StageRow(
        run_key=KEY, name="evaluate:piqa:dense", stage_key="evaluate-v1-9", kind="report", status="failed"
    )
    record = recorded(store, checkpoints, stages=(failed,), failed=True, message="evaluate:piqa:dense: | <gone>")
    assert [each.content.status for each in record.checkpoints] == ["failed", "completed", "completed"]
    assert json.loads(record.content.artifacts["stages.json"])[0]["began_at"] is None
    assert "**Failed:** evaluate:piqa:dense: \\| &lt;gone&gt;" in record.content.description
    assert "last-good" not in record.aliases
    assert record.content.params == {}, "they would be kept when the run is mended and has more checkpoints"


def test_the_description_of_a_run_has_a_row_per_checkpoint() -> None:
    params = {"dense": {"method": "none"}, "<script>|ü": {"method": "slimgpt", "sparsity": "0.2"}}
    metrics = [row("dense", 12.3456), row("<script>|ü", math.nan), row("dense", 0.5, "acc", task="piqa")]
    metrics += [row("dense", 0.6, "acc_norm", task="piqa")]
    metrics += [row("<script>|ü", 134_515_008, "num_parameters", suite="profile", task="profile")]
    text = run_description("Some words.", params, metrics, None)
    assert text.splitlines() == [
        "Some words.",
        "",
        "| checkpoint | method | sparsity | recovery | wikitext2 ppl@2048 | piqa acc | profile num_parameters |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| dense | none |  |  | 12.35 | 0.5 |  |",
        "| &lt;script&gt;\\|ü | slimgpt | 0.2 |  | nan |  | 134515008 |",
    ]


def test_a_long_description_ends_with_whole_lines() -> None:
    metrics = [row("dense", 1.0, f"metric-{index}") for index in range(1000)]
    for text in (
        checkpoint_description("dense", {"model": "m"}, metrics, "import-v2-0"),
        run_description("words " * 9000, {f"name-{index}": {} for index in range(900)}, metrics, "message " * 9000),
    ):
        assert len(text) < MOST_CHARACTERS
        *_, last = [line for line in text.splitlines() if line.startswith("|")]
        assert last.endswith("|")
        assert text.endswith("more rows: `slimline results --format csv`")


def test_aliases(store: ArtifactStore, checkpoints: dict[str, ArtifactRef]) -> None:
    """The better of two at 20 %: infinity is worse than anything, and NaN is no figure."""
    lineages = {name: lineage_of(ref, store) for name, ref in checkpoints.items()}
    figures = {"slimgpt-20": math.inf, "slimgpt-20+lora": 20.25}
    metrics = [row("dense", 10.0), *(row(name, value) for name, value in figures.items())]
    expected = {"last-good": "slimgpt-20+lora", "best-20pct": "slimgpt-20+lora"}
    assert aliases(lineages, metrics, failed=False) == expected
    assert aliases(lineages, metrics, failed=True) == {"best-20pct": "slimgpt-20+lora"}
    accuracies = [row("slimgpt-20", 0.6, "acc"), row("slimgpt-20+lora", 0.5, "acc"), row("slimgpt-20", math.nan)]
    assert aliases(lineages, accuracies, failed=True) == {"best-20pct": "slimgpt-20"}
    assert aliases(lineages, [row("slimgpt-20", 5.0)], failed=True) == {}, "only one of two was measured"
    assert aliases({}, [], failed=False) == {}


def test_a_lineage_goes_back_as_far_as_the_store(store: ArtifactStore) -> None:
    gone = {"kind": "checkpoint", "key": "import-model-v2-9"}
    ref = make(
        store, "checkpoint", "prune-depth-v1-0", {"plugin": "depth", "config": {"layers": 6}, "checkpoint": gone}
    )
    lineage = lineage_of(ref, store)
    assert (lineage.params("")["sparsity"], lineage.params("")["model"], lineage.sparsity) == ("6 layers", "none", None)
    assert Lineage((), ()).params("m")["method"] == "none"
