from __future__ import annotations

import logging
import math
import os
import sqlite3
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from infra.errors import TrackingUnusable
from infra.tracking.mlflow_rules import accepted_keys, accepted_model_name, stored
from infra.tracking.mlflow_store import CHANGED_PARAMS_TAG, LABEL_TAG, RUN_KEY_TAG
from infra.tracking.records import CheckpointRecord, MetricPoint, RunContent, RunRecord
from infra.tracking.tracker import Tracker
from tests.infra.processes import finish, kill_after_line, start

pytestmark = pytest.mark.slow  # not in `make test-fast`

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CURVE = [MetricPoint("train/loss", 1 / (step + 1), step) for step in range(20)]


def record(
    tracker: Tracker,
    run_key: str = "run-v1-0",
    *,
    name: str = "demo",
    params: Mapping[str, str] | None = None,
    metrics: Sequence[MetricPoint] = (),
    tags: Mapping[str, str] | None = None,
    artifacts: Mapping[str, str] | None = None,
    checkpoints: Sequence[CheckpointRecord] = (),
    status: Literal["completed", "failed"] = "completed",
    **more: Any,
) -> str:
    content = RunContent(name, status, params or {}, metrics, tags or {}, artifacts or {})
    return tracker.record(RunRecord(run_key, content, checkpoints, **more))


def checkpoint(label: str, folder: Path | None = None, key: str | None = None, **content: Any) -> CheckpointRecord:
    known = key or (folder.name if folder else f"prune-v1-{label}")
    return CheckpointRecord(label, known, RunContent(label, **content), folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for this file, since MLflow takes seconds to make one; every test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def tracker(shared: str, request: pytest.FixtureRequest) -> Tracker:
    return Tracker(shared, experiment=str(request.node.name))


def client(tracker: Tracker) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)


def experiment_id(tracker: Tracker) -> str:
    experiment = client(tracker).get_experiment_by_name(tracker.experiment)
    assert experiment is not None
    return str(experiment.experiment_id)


def only_run(tracker: Tracker) -> Run:
    """The only one that is not of a checkpoint."""
    (run,) = [run for run in client(tracker).search_runs([experiment_id(tracker)]) if RUN_KEY_TAG in run.data.tags]
    return run


def children(tracker: Tracker) -> dict[str, Run]:
    """The runs of all checkpoints, by name; of no two the same."""
    found = client(tracker).search_runs([experiment_id(tracker)], f"tags.`{LABEL_TAG}` != ''")
    assert {run.data.tags["mlflow.parentRunId"] for run in found} <= {only_run(tracker).info.run_id}
    assert len({run.data.tags[LABEL_TAG] for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    points = client(tracker).get_metric_history(only_run(tracker).info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def artifact(tracker: Tracker, path: str) -> str:
    folder = only_run(tracker).info.artifact_uri.removeprefix("file://")
    return (Path(folder) / path).read_text()


def test_everything_arrives(tracker: Tracker) -> None:
    texts = {"report.md": "# Hello ☃", "deep/spec.yaml": "a: 1"}
    metrics = [*CURVE, MetricPoint("piqa/acc,none", 0.5)]
    run_id = record(tracker, params={"seed": "1"}, metrics=metrics, tags={"method": "slimgpt"}, artifacts=texts)
    run = only_run(tracker)
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "demo", "FINISHED")
    assert run.data.params == {"seed": "1"}
    assert (run.data.tags[RUN_KEY_TAG], run.data.tags["method"]) == ("run-v1-0", "slimgpt")
    assert run.data.metrics["piqa/acc_none"] == 0.5
    assert history(tracker, "train/loss") == [(point.step, point.value) for point in CURVE]
    assert artifact(tracker, "report.md") == "# Hello ☃"
    assert artifact(tracker, "deep/spec.yaml") == "a: 1"


def test_files_lie_beside_the_database(tracker: Tracker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    record(tracker, artifacts={"report.md": "x"})
    assert list(tmp_path.iterdir()) == []
    database = Path(tracker.uri.removeprefix("sqlite:///"))
    assert {path.name for path in database.parent.iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlartifacts"}


def test_recording_the_same_again_changes_nothing(tracker: Tracker) -> None:
    metrics = [*CURVE, MetricPoint("nan", math.nan), MetricPoint("inf", -math.inf)]
    first = record(tracker, metrics=metrics, params={"a": "1"})
    ended = only_run(tracker).info.end_time
    assert record(tracker, metrics=metrics, params={"a": "1"}) == first
    assert only_run(tracker).info.end_time == ended


def test_only_new_points_are_added(tracker: Tracker) -> None:
    odd = [MetricPoint("nan", math.nan), MetricPoint("inf", -math.inf), MetricPoint("ppl", 20.0)]
    first = record(tracker, metrics=[*CURVE[:10], *odd])
    assert record(tracker, metrics=[*CURVE, *odd]) == first
    assert history(tracker, "train/loss") == [(point.step, point.value) for point in CURVE]
    assert [len(history(tracker, key)) for key in ("nan", "inf", "ppl")] == [1, 1, 1]


def test_a_changed_value_becomes_the_latest_also_when_it_changes_back(tracker: Tracker) -> None:
    for value in (1.0, 2.0, 1.0):
        record(tracker, metrics=[MetricPoint("decode_ms", value)])
        assert only_run(tracker).data.metrics == {"decode_ms": value}
        time.sleep(0.002)  # MLflow orders the points of a step by milliseconds


def test_a_point_given_twice_is_logged_once(tracker: Tracker) -> None:
    for tag in ("a", "b"):
        record(tracker, metrics=[MetricPoint("x", 1.0), MetricPoint("x", 2.0)], tags={"t": tag})
    assert history(tracker, "x") == [(0, 2.0)]


def test_params_keep_their_first_value_and_say_so(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    record(tracker, params={"device": "cpu", "seed": "1"})
    with caplog.at_level(logging.WARNING, "slimline"):
        record(tracker, params={"device": "cuda", "seed": "1", "new": "x"})
    assert only_run(tracker).data.params == {"device": "cpu", "seed": "1", "new": "x"}
    assert only_run(tracker).data.tags[CHANGED_PARAMS_TAG] == '{"device": "cuda"}'
    assert "first value of device" in caplog.text
    record(tracker, params={"device": "cpu"})
    assert CHANGED_PARAMS_TAG not in only_run(tracker).data.tags


def test_tags_texts_names_and_status_are_replaced(tracker: Tracker) -> None:
    record(tracker, name="old", tags={"t": "1"}, artifacts={"report.md": "old and longer"}, status="failed")
    assert only_run(tracker).info.status == "FAILED"
    record(tracker, name="new", tags={"t": "2"}, artifacts={"report.md": "new"}, status="completed")
    run = only_run(tracker)
    assert (run.info.status, run.info.run_name, run.data.tags["t"]) == ("FINISHED", "new", "2")
    assert artifact(tracker, "report.md") == "new"


def test_run_keys_are_separate_runs(tracker: Tracker) -> None:
    assert record(tracker, "run-v1-a") != record(tracker, "run-v1-b")


def test_a_deleted_run_or_experiment_is_made_again(tracker: Tracker) -> None:
    first = record(tracker)
    client(tracker).delete_run(first)
    second = record(tracker)
    assert second != first
    client(tracker).delete_experiment(experiment_id(tracker))
    third = record(tracker)
    assert client(tracker).get_experiment(experiment_id(tracker)).lifecycle_stage == "active"
    assert client(tracker).get_run(third).info.lifecycle_stage == "active"


def test_large_records_are_sent_in_chunks(tracker: Tracker) -> None:
    many = {f"p{index}": "x" * 7000 for index in range(250)}
    metrics = [MetricPoint(f"m{index % 3}", index, index) for index in range(2500)]
    for tag in ("a", "b"):
        record(tracker, params=many, tags=dict.fromkeys(many, "y" * 9000) | {"t": tag}, metrics=metrics)
    run = only_run(tracker)
    assert (len(run.data.params), len(run.data.params["p0"]), len(run.data.tags["p0"])) == (250, 6000, 8000)
    assert CHANGED_PARAMS_TAG not in run.data.tags
    assert sum(len(history(tracker, f"m{index}")) for index in range(3)) == 2500


def test_odd_keys_never_fail(tracker: Tracker) -> None:
    keys = ["acc,none", "acc:none", "/abs", "a//b", "../up", "..", ".", "", "é/ü", "a" * 300, "x\ny", "a/./b", "(%)"]
    values = {key: str(index) for index, key in enumerate(keys)}
    record(tracker, metrics=[MetricPoint(key, index) for index, key in enumerate(keys)], params=values, tags=values)
    assert sorted(only_run(tracker).data.metrics.values()) == list(range(len(keys)))
    assert sorted(only_run(tracker).data.params.values(), key=int) == list(values.values())


def test_checkpoints_are_registered_once_where_they_lie(tracker: Tracker, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "prune-v1-0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(100))
    name = f"reg/{tmp_path.name}"
    for tag in ("a", "b"):
        record(tracker, name=name, checkpoints=[checkpoint("slimgpt-20", folder)], tags={"t": tag})
    record(tracker, "run-v1-other", name=name, checkpoints=[checkpoint("slimgpt-20", folder)])
    other = checkpoint("slimgpt-20", tmp_path / "store" / "prune-v1-1")
    record(tracker, "run-v1-other", name=name, checkpoints=[other])
    model = accepted_model_name(name)
    versions = {version.source: version for version in client(tracker).search_model_versions(f"name='{model}'")}
    assert set(versions) == {folder.as_uri(), (tmp_path / "store" / "prune-v1-1").as_uri()}
    assert len(client(tracker).search_model_versions(f"name='{model}'")) == 2
    assert versions[folder.as_uri()].tags == {
        RUN_KEY_TAG: "run-v1-0",
        "slimline.checkpoint_key": "prune-v1-0",
        LABEL_TAG: "slimgpt-20",
    }
    database = Path(tracker.uri.removeprefix("sqlite:///"))
    assert not list(database.parent.rglob("*.safetensors"))


def test_nothing_new_is_recognised_quickly_and_without_mlflow(tracker: Tracker) -> None:
    metrics = [*CURVE, *(MetricPoint(f"m{index}", index) for index in range(600))]
    run_id = record(tracker, metrics=metrics)
    code = """
import sys, time
from infra.tracking.records import MetricPoint
from infra.tracking.tracker import Tracker
from tests.infra.tracking.test_tracker import CURVE, record
metrics = [*CURVE, *(MetricPoint(f"m{index}", index) for index in range(600))]
started = time.process_time()
run_id = record(Tracker(sys.argv[1], sys.argv[2]), metrics=metrics)
print(run_id, "mlflow" in sys.modules, time.process_time() - started < 0.5)
"""
    assert finish(start(code, tracker.uri, tracker.experiment)) == f"{run_id} False True"


def test_nothing_new_is_recognised_by_mlflow_too(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = record(tracker, metrics=CURVE)
    monkeypatch.setattr(sqlite3, "connect", lambda *_, **__: (_ for _ in ()).throw(sqlite3.OperationalError("other")))
    ended = only_run(tracker).info.end_time
    assert record(tracker, metrics=CURVE) == run_id
    assert only_run(tracker).info.end_time == ended


def test_a_record_killed_in_the_middle_is_completed(tracker: Tracker) -> None:
    code = """
import sys, time
from infra.tracking.mlflow_store import MlflowStore
from infra.tracking.tracker import Tracker
from tests.infra.tracking.test_tracker import CURVE, record
real = MlflowStore.log_points
def slow(*arguments):
    real(*arguments)
    print("half", flush=True)
    time.sleep(600)
MlflowStore.log_points = slow
record(Tracker(sys.argv[1], sys.argv[2]), metrics=CURVE[:10], artifacts={"report.md": "x"})
"""
    record(tracker, "run-v1-first")
    assert kill_after_line(start(code, tracker.uri, tracker.experiment)) == "half"
    record(tracker, metrics=CURVE, artifacts={"report.md": "x"})
    (run,) = client(tracker).search_runs([experiment_id(tracker)], f"tags.`{RUN_KEY_TAG}` = 'run-v1-0'")
    assert run.info.status == "FINISHED"
    assert len(client(tracker).get_metric_history(run.info.run_id, "train/loss")) == len(CURVE)


RACER = """
import sys
from infra.tracking.tracker import Tracker
from tests.infra.tracking.test_tracker import CURVE, record
tracker = Tracker(sys.argv[1])
print(record(tracker, "run-v1-shared", metrics=CURVE), record(tracker, sys.argv[2], metrics=CURVE))
"""


@pytest.mark.slow
def test_three_processes_race_for_the_first_creation(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    # What a killed first creation leaves behind is in nobody's way.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mlflow.db.unfinished").write_bytes(b"half")
    ids = [finish(child).split() for child in [start(RACER, uri, f"run-v1-{name}") for name in "abc"]]
    assert len({shared for shared, _ in ids}) == 1
    assert len({own for _, own in ids}) == 3
    tracker = Tracker(uri)
    runs = client(tracker).search_runs([experiment_id(tracker)])
    assert len(runs) == 4
    assert len(client(tracker).get_metric_history(ids[0][0], "train/loss")) == len(CURVE)
    assert "mlflow.db.unfinished" not in os.listdir(tmp_path / "new")


def test_an_unusable_store_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_bytes(b"not a database" * 500)
    for uri in (
        f"sqlite:///{tmp_path}/bad.db",
        "sqlite:////proc/no/mlflow.db",
        "htp://somewhere",
        "postgresql+nodriver://me:secret@127.0.0.1:1/x",
    ):
        with pytest.raises(TrackingUnusable, match=r"did not take run run-v1-0: .*SLIMLINE_MLFLOW_URI") as caught:
            record(Tracker(uri))
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_accepted_keys_are_unique_and_keep_their_values() -> None:
    accepted = accepted_keys({"acc,none": 1, "acc_none": 2, "acc;none": 3})
    assert sorted(accepted.values()) == [1, 2, 3]
    assert "acc_none" in accepted
    assert accepted_keys({"loss": 1}) == {"loss": 1}


def test_stored_values_compare_as_sql_keeps_them() -> None:
    assert stored(math.nan) == stored(math.nan)
    assert stored(math.inf) == stored(sys.float_info.max)
    assert stored(0.1) != stored(0.2)


def test_whether_a_run_is_recorded(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tracker.has("run-v1-0")
    run_id = record(tracker)
    assert not tracker.has("run-v1-1")
    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "_client", lambda self: pytest.fail("the file says it, without mlflow"))
        assert tracker.has("run-v1-0")
    tracker._client().delete_run(run_id)
    assert not tracker.has("run-v1-0")
    assert not Tracker(f"sqlite:///{tmp_path / 'none.db'}").has("run-v1-0")
    assert not (tmp_path / "none.db").exists()
