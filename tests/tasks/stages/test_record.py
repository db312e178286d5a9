"""What is recorded of trainings: every point in DuckDB and in MLflow, once, whoever logged it first."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest
from mlflow import MlflowClient

from infra.artifacts.store import ArtifactRef
from infra.results.store import ResultsStore
from infra.settings import Settings
from infra.sources.find import Sources
from infra.tracking.tracker import Tracker
from pruning.walk.state import LayerEntry, SubLayerReport
from tasks.execution.context import RunContext
from tasks.execution.curves import InRun, live_curves
from tasks.execution.stage import importing
from tasks.recording.layers import shown_in
from tasks.recording.outcome import RunOutcome
from tasks.stages.record import _record

pytestmark = pytest.mark.slow  # not in `make test-fast`

KEY = "run-demo-v1-0123456789abcdef"
CURVES = {
    "train_loss": [[1, 2.5], [2, 2.25], [3, 2.0]],
    "heldout_loss": [[0, 3.0], [3, 2.75]],
    "learning_rate": [[1, 1e-4], [2, 1e-4], [3, 0.0]],
}


@pytest.fixture
def run_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_mlflow: Path) -> RunContext:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(blank_mlflow, home / "mlflow.db")
    monkeypatch.setenv("SLIMLINE_HOME", str(home))
    settings = Settings(device="cpu")
    return RunContext(settings, Sources((), None, False, home=home))


def checkpoint(run_context: RunContext, key: str, files: Mapping[str, Any]) -> ArtifactRef:
    ref = ArtifactRef(kind="checkpoint", key=key)
    with run_context.store.writing(ref, request={}, versions={}) as folder:
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return ref


def outcome(checkpoints: Mapping[str, ArtifactRef], **changes: Any) -> RunOutcome:
    fields: dict[str, Any] = {
        "run_key": KEY,
        "name": "demo",
        "spec": {},
        "started_at": datetime(2025, 6, 1, tzinfo=UTC),
        "stages": (),
        "checkpoints": dict(checkpoints),
        "measured": (),
        "failed": False,
        "message": None,
    }
    return RunOutcome(**fields | changes)


def histories(run_context: RunContext) -> dict[str, list[tuple[int, float]]]:
    """All metrics of the checkpoints of the only MLflow run, which has none itself, below their names."""
    client = MlflowClient(run_context.settings.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    (parent,) = [run for run in runs if "slimline.run_key" in run.data.tags]
    assert parent.data.metrics == {}
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(below) == len(runs) - 1 == len({run.info.run_name for run in below})
    return {
        f"{run.info.run_name}/{key}": sorted((each.step, each.value) for each in history)
        for run in below
        for key in run.data.metrics
        for history in [client.get_metric_history(run.info.run_id, key)]
    }


def pairs(points: Any) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points]


def test_curves_of_trainings_are_recorded(run_context: RunContext) -> None:
    """Of a recovery, and of a pruning that trained; of one that did not there are none."""
    lora = checkpoint(run_context, "recover-lora-v2-0", {"recovery.json": {"curves": CURVES, "num_steps": 3}})
    learned = checkpoint(
        run_context, "prune-learned-v1-0", {"pruning.json": {"layers": [], "curves": {"train_loss": [[1, 0.5]]}}}
    )
    trials = {"search/heldout_kl": [[0, 0.75], [1, 0.5]]}
    searched = checkpoint(run_context, "prune-searched-v1-0", {"pruning.json": {"layers": [], "curves": trials}})
    null = checkpoint(run_context, "prune-null-v1-0", {"pruning.json": {"layers": [], "curves": None}})
    plain = checkpoint(run_context, "prune-plain-v1-0", {"pruning.json": {"layers": []}})
    names = {"lora": lora, "again": lora, "learned": learned, "searched": searched, "null": null, "plain": plain}
    for _ in range(2):
        _record(outcome(names), run_context)
    results = ResultsStore.of(run_context.settings)
    assert [(row.run_key, row.stage_key, row.metric, row.step, row.value) for row in results.curves(KEY)] == [
        *((KEY, lora.key, metric, step, value) for metric, points in CURVES.items() for step, value in points),
        (KEY, learned.key, "train_loss", 1, 0.5),
        (KEY, searched.key, "search/heldout_kl", 0, 0.75),
        (KEY, searched.key, "search/heldout_kl", 1, 0.5),
    ]
    expected = {
        f"{name}/training/{metric}": pairs(points) for name in ("lora", "again") for metric, points in CURVES.items()
    }
    expected |= {"learned/training/train_loss": [(1, 0.5)], "searched/search/heldout_kl": [(0, 0.75), (1, 0.5)]}
    assert histories(run_context) == expected
    with duckdb.connect(str(results.path), read_only=True) as connection:
        question = "SELECT step FROM curves WHERE metric = 'heldout_loss' ORDER BY value LIMIT 1"
        assert connection.execute(question).fetchall() == [(3,)]


def test_what_was_shown_live_is_not_doubled(run_context: RunContext) -> None:
    """Of a training that was killed after step 2, went on from step 1, and sent all but the last point."""
    in_run = InRun(KEY, "demo", "slimgpt-20+lora")
    losses = dict(pairs(CURVES["train_loss"]))
    for steps in ((1, 2), (2,)):
        with live_curves(run_context.settings, in_run, importing) as curves:
            for step in steps:
                curves(step, {"train_loss": losses[step], "learning_rate": 1e-4})
    assert not Tracker(run_context.settings.tracking_uri).has(KEY)
    before = histories(run_context)
    assert before["slimgpt-20+lora/training/train_loss"] == pairs(CURVES["train_loss"][:2])
    lora = checkpoint(run_context, "recover-lora-v2-0", {"recovery.json": {"curves": CURVES}})
    _record(outcome({"slimgpt-20+lora": lora}), run_context)
    whole = {f"slimgpt-20+lora/training/{metric}": pairs(points) for metric, points in CURVES.items()}
    assert histories(run_context) == whole
    assert Tracker(run_context.settings.tracking_uri).has(KEY)
    (run,) = ResultsStore.of(run_context.settings).runs()
    found = MlflowClient(run_context.settings.tracking_uri).get_run(run.mlflow_run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "demo")


def test_layers_are_shown_live_as_they_are_recorded(run_context: RunContext) -> None:
    """Of a pruning that was killed after two of its three layers: the one that goes on shows all of them again."""
    common = {"name": "x", "kept": 1, "total": 2, "condition": None, "num_tokens": 7}
    reports = [
        SubLayerReport(layer=0, sub_layer="attention", measured_error=0.3, output_energy=0.7, score=0.25, **common),
        SubLayerReport(layer=0, sub_layer="mlp", measured_error=0.0, **common),
        SubLayerReport(layer=1, sub_layer="mlp", measured_error=0.1, output_energy=0.9, **common),
        SubLayerReport(layer=2, sub_layer="mlp", measured_error=None, score=math.inf, **common),
    ]
    entries = [LayerEntry(plan=None, reports=tuple(r for r in reports if r.layer == layer)) for layer in range(3)]
    for done in (entries[:2], entries):
        with live_curves(run_context.settings, InRun(KEY, "demo", "slimgpt-20"), importing) as curves:
            show = shown_in(curves)
            for entry in done:
                show(entry)
    live = histories(run_context)
    layers = [report.model_dump() for report in reports]
    pruned = checkpoint(run_context, "prune-slimgpt-v1-0", {"pruning.json": {"layers": layers}})
    _record(outcome({"slimgpt-20": pruned}), run_context)
    assert histories(run_context) == live
    assert live == {
        "slimgpt-20/layers/attention_error": [(0, 0.3 / 0.7)],
        "slimgpt-20/layers/attention_score": [(0, 0.25)],
        "slimgpt-20/layers/mlp_error": [(0, 0.0), (1, 0.1 / 0.9)],
        "slimgpt-20/layers/mlp_score": [(2, sys.float_info.max)],  # as a SQL store keeps infinity
    }


def test_a_run_whose_training_failed_gets_its_status(run_context: RunContext) -> None:
    with live_curves(run_context.settings, InRun(KEY, "demo", "lora"), importing) as curves:
        curves(1, {"train_loss": 2.5})
    _record(outcome({}, failed=True, message="diverged"), run_context)
    (run,) = ResultsStore.of(run_context.settings).runs()
    assert ResultsStore.of(run_context.settings).curves() == ()
    assert histories(run_context) == {"lora/training/train_loss": [(1, 2.5)]}
    assert MlflowClient(run_context.settings.tracking_uri).get_run(run.mlflow_run_id).info.status == "FAILED"


def test_odd_losses_are_recorded_as_what_they_are(run_context: RunContext) -> None:
    """JSON has no NaN: pydantic writes null or a word, Python its constants."""
    losses = [[1, None], [2, "NaN"], [3, "Infinity"], [4, "-Infinity"], [5, math.nan], [6, math.inf]]
    lora = checkpoint(run_context, "recover-lora-v2-0", {"recovery.json": {"curves": {"train_loss": losses}}})
    for name in ("demo", "other"):
        _record(outcome({"lora": lora}, name=name), run_context)
    values = [str(row.value) for row in ResultsStore.of(run_context.settings).curves()]
    assert values == ["nan", "nan", "inf", "-inf", "nan", "inf"]
    assert [step for step, _ in histories(run_context)["lora/training/train_loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_sub_layer_that_an_earlier_pruning_took_is_recorded(run_context: RunContext) -> None:
    gone = SubLayerReport(layer=2, sub_layer="attention", name="x", kept=0, total=0, num_tokens=0)
    pruned = checkpoint(run_context, "prune-slimgpt-v1-0", {"pruning.json": {"layers": [gone.model_dump()]}})
    _record(outcome({"slimgpt-20": pruned}), run_context)
    (row,) = ResultsStore.of(run_context.settings).layers(KEY)
    assert (row.layer, row.kept, row.total, row.sparsity) == (2, 0, 0, 0.0)
