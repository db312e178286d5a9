"""Curves that grow in MLflow while a training trains: seen at once, never doubled, and never worth a training."""

from __future__ import annotations

import logging
import math
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infra.filesystem.locks import flocked
from infra.tracking.database import lock_file
from infra.tracking.live import LiveCurves
from infra.tracking.mlflow_store import CONTENT_TAG, RUN_KEY_TAG
from infra.tracking.records import CheckpointRecord, MetricPoint
from infra.tracking.tracker import LiveRun, Tracker
from tests.infra.processes import kill_after_line, start
from tests.infra.tracking.test_tracker import checkpoint, children, client, only_run, record

pytestmark = pytest.mark.slow  # not in `make test-fast`

if TYPE_CHECKING:
    from mlflow.entities import Run

KEY = "run-demo-v1-0"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, blank_mlflow: Path) -> str:
    """One database for this file; every test has an experiment of its own."""
    path = tmp_path_factory.mktemp("live") / "mlflow.db"
    shutil.copyfile(blank_mlflow, path)
    return f"sqlite:///{path}"


@pytest.fixture
def tracker(shared: str, request: pytest.FixtureRequest) -> Tracker:
    return Tracker(shared, experiment=str(request.node.name))


def training(tracker: Tracker, name: str = "lora", **seconds: float) -> LiveCurves:
    """The curves of a training of the run KEY, as they go to MLflow when nobody says how often."""
    return LiveCurves(LiveRun(tracker, KEY, "demo", name).log, name, **seconds)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(tracker: Tracker) -> list[Run]:
    experiment = client(tracker).get_experiment_by_name(tracker.experiment)
    return [] if experiment is None else list(client(tracker).search_runs([experiment.experiment_id]))


def history(tracker: Tracker, metric: str, name: str = "lora") -> list[tuple[int, float]]:
    """Of the checkpoint that is trained; nothing if it has no run yet."""
    child = children(tracker).get(name)
    points = client(tracker).get_metric_history(child.info.run_id, f"training/{metric}") if child else []
    return sorted((point.step, point.value) for point in points)


def trained(metric: str, values: Mapping[int, float], name: str = "lora", **content: Any) -> CheckpointRecord:
    points = [MetricPoint(f"training/{metric}", value, step) for step, value in values.items()]
    return checkpoint(name, metrics=points, **content)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


def test_the_first_points_are_seen_at_once_and_the_rest_when_it_ends(tracker: Tracker) -> None:
    began = time.time() * 1000
    with training(tracker) as curves:
        curves(1, {"train_loss": 2.5, "learning_rate": 1e-4})
        until(lambda: runs(tracker) and history(tracker, "train_loss"))
        run, child = only_run(tracker), children(tracker)["lora"]
        assert (run.info.status, run.info.run_name, run.data.tags[RUN_KEY_TAG]) == ("RUNNING", "demo", KEY)
        assert (child.info.status, run.data.metrics) == ("RUNNING", {})
        assert child.data.metrics == {"training/train_loss": 2.5, "training/learning_rate": 1e-4}
        time.sleep(0.3)
        said = time.time() * 1000
        for step in range(2, 50):
            curves(step, {"train_loss": 2.5 / step})
        curves(49, {"heldout_loss": 3.0})
        time.sleep(0.3)
        assert history(tracker, "train_loss") == [(1, 2.5)], "only every ten seconds"
    assert history(tracker, "train_loss") == [(step, 2.5 / step) for step in range(1, 50)]
    assert history(tracker, "heldout_loss") == [(49, 3.0)]
    points = client(tracker).get_metric_history(children(tracker)["lora"].info.run_id, "training/train_loss")
    moments = [point.timestamp for point in points]
    assert began - 1 <= min(moments) < said - 250, "a point has the time at which it was measured"
    assert said - 1 <= sorted(moments)[1] <= max(moments) < said + 250


def test_later_points_come_after_the_interval(tracker: Tracker) -> None:
    with training(tracker, interval_seconds=0.05) as curves:
        for step in range(1, 4):
            curves(step, {"train_loss": 1 / step})
            until(lambda step=step: runs(tracker) and len(history(tracker, "train_loss")) == step)


def test_a_training_that_says_nothing_makes_no_run(tracker: Tracker) -> None:
    with training(tracker):
        pass
    assert runs(tracker) == []


def test_a_run_under_way_is_not_recorded(tracker: Tracker) -> None:
    with training(tracker) as curves:
        curves(1, {"train_loss": 2.5})
    assert only_run(tracker).info.status == "RUNNING"
    assert CONTENT_TAG not in only_run(tracker).data.tags
    assert not tracker.has(KEY)
    before = children(tracker)["lora"].info.run_id
    run_id = record(tracker, KEY, params={"seed": "1"}, checkpoints=[checkpoint("lora", key="recover-lora-v1-0")])
    assert (only_run(tracker).info.run_id, only_run(tracker).info.status) == (run_id, "FINISHED")
    child = children(tracker)["lora"]
    assert (child.info.run_id, child.info.status) == (before, "FINISHED")
    assert only_run(tracker).data.params == {"seed": "1"}
    assert tracker.has(KEY)


def test_the_record_repeats_nothing(tracker: Tracker) -> None:
    """NaN, infinity and a name that MLflow does not take as it is included; the record brings what was not logged."""
    name = "slimgpt-20+lora"
    losses = [2.5, math.nan, math.inf, -math.inf, 0.1 + 0.2]
    with training(tracker, name) as curves:
        for step, loss in enumerate(losses[:4], start=1):
            curves(step, {"train_loss": loss})
    points = [MetricPoint("training/train_loss", loss, step) for step, loss in enumerate(losses, start=1)]
    whole = checkpoint(name, metrics=[*points, MetricPoint("perplexity/wikitext2/ppl@2048", 20.0)])
    for tag in ("a", "b"):
        record(tracker, KEY, checkpoints=[whole], tags={"t": tag})
    assert set(children(tracker)[name].data.metrics) == {"training/train_loss", "perplexity/wikitext2/ppl_2048"}
    largest = sys.float_info.max
    kept = history(tracker, "train_loss", name)
    assert [step for step, _ in kept] == [1, 2, 3, 4, 5]
    assert math.isnan(kept[1][1])
    assert [value for step, value in kept if step != 2] == [2.5, largest, -largest, 0.1 + 0.2]
    assert {run.info.status for run in runs(tracker)} == {"FINISHED"}


def test_a_training_that_goes_on_repeats_nothing(tracker: Tracker) -> None:
    with training(tracker) as curves:
        for step in range(1, 7):
            curves(step, {"train_loss": 1 / step, "tokens_per_second": 100.0})
    with training(tracker) as curves:  # from its checkpoint of step 3
        for step in range(4, 9):
            curves(step, {"train_loss": 1 / step, "tokens_per_second": 200.0 if step == 5 else 100.0})
    assert history(tracker, "train_loss") == [(step, 1 / step) for step in range(1, 9)]
    speeds = [(step, 200.0 if step == 5 else 100.0) for step in range(1, 9)]
    assert history(tracker, "tokens_per_second") == sorted([*speeds, (5, 100.0)])
    record(tracker, KEY, checkpoints=[trained("tokens_per_second", dict(speeds))])
    assert len(history(tracker, "tokens_per_second")) == 9, "the value logged last at step 5 is the recorded one"


def test_a_killed_training_stays_running_until_it_is_recorded(tracker: Tracker) -> None:
    code = """
import sys, time
from infra.tracking.tracker import Tracker
from tests.infra.tracking.test_live import history, runs, training, until
tracker = Tracker(sys.argv[1], sys.argv[2])
with training(tracker, interval_seconds=0.05) as curves:
    for step in range(1, 4):
        curves(step, {"train_loss": 1 / step})
        time.sleep(0.2)
    until(lambda: runs(tracker) and len(history(tracker, "train_loss")) == 3)
    print("three", flush=True)
    time.sleep(600)
"""
    assert kill_after_line(start(code, tracker.uri, tracker.experiment)) == "three"
    assert only_run(tracker).info.status == "RUNNING"
    assert not tracker.has(KEY)
    with training(tracker) as curves:
        for step in range(2, 5):
            curves(step, {"train_loss": 1 / step})
    record(tracker, KEY, status="failed")
    assert history(tracker, "train_loss") == [(step, 1 / step) for step in range(1, 5)]
    assert {run.info.status for run in runs(tracker)} == {"FAILED"}, "what was trained is in no record"


def test_a_recorded_run_whose_training_is_refreshed_is_under_way_again(tracker: Tracker) -> None:
    whole = [trained("train_loss", {1: 1.0, 2: 0.5})]
    first = record(tracker, KEY, checkpoints=whole)
    with training(tracker) as curves:
        curves(1, {"train_loss": 1.0})
        until(lambda: only_run(tracker).info.status == "RUNNING")
        assert not tracker.has(KEY)
        curves(2, {"train_loss": 0.5})
    assert record(tracker, KEY, checkpoints=whole) == first, "also if it comes to the same as before"
    assert {run.info.status for run in runs(tracker)} == {"FINISHED"}
    assert history(tracker, "train_loss") == [(1, 1.0), (2, 0.5)]


def test_a_run_that_was_deleted_meanwhile_is_made_again(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    with training(tracker, interval_seconds=0.05, patience_seconds=0.05) as curves:
        curves(1, {"train_loss": 1.0})
        until(lambda: runs(tracker) and history(tracker, "train_loss"))
        client(tracker).delete_run(children(tracker)["lora"].info.run_id)
        curves(2, {"train_loss": 0.5})
        until(lambda: runs(tracker) and history(tracker, "train_loss"))
    assert history(tracker, "train_loss") == [(2, 0.5)]
    assert len(warnings(caplog)) == 1


def test_two_trainings_of_a_run_at_once_share_it(tracker: Tracker) -> None:
    gate = threading.Barrier(2)

    def train(name: str) -> None:
        with training(tracker, name, interval_seconds=0.02) as curves:
            gate.wait()
            for step in range(1, 101):
                curves(step, {"train_loss": 1 / step, "grad_norm": float(step)})
                time.sleep(0.002)

    threads = [threading.Thread(target=train, args=(name,)) for name in ("lora", "cpt")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("lora", "cpt"):
        assert history(tracker, "train_loss", name) == [(step, 1 / step) for step in range(1, 101)]
        assert history(tracker, "grad_norm", name) == [(step, float(step)) for step in range(1, 101)]


def test_an_error_of_the_training_passes_and_what_it_reached_is_logged(tracker: Tracker) -> None:
    def train() -> None:
        with training(tracker) as curves:
            curves(1, {"train_loss": 1.0})
            until(lambda: runs(tracker) and history(tracker, "train_loss"))
            curves(2, {"train_loss": math.nan})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert [step for step, _ in history(tracker, "train_loss")] == [1, 2]


@contextmanager
def deaf_server() -> Iterator[str]:
    """Its port takes connections, and nobody answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def no_server() -> str:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{reserved.getsockname()[1]}"


def test_no_server_costs_one_warning_and_no_second_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run, tries = LiveRun(Tracker(no_server()), KEY, "demo", "lora"), []

    def counted(points: Sequence[MetricPoint], over: threading.Event) -> None:
        tries.append(len(points))
        run.log(points, over)

    with LiveCurves(counted, "lora", interval_seconds=0.01) as curves:
        curves(1, {"train_loss": 1.0})
        until(lambda: warnings(caplog))
        started = time.monotonic()
        for step in range(2, 1000):
            curves(step, {"train_loss": 1 / step})
        assert time.monotonic() - started < 0.5
        time.sleep(0.1)
    assert tries == [1]
    (warning,) = warnings(caplog)
    assert warning.startswith("the curves of lora are not shown while they grow: MLflow at http://127.0.0.1")
    assert warning.endswith("the stage goes on, and its curves are recorded with the run")


def test_a_server_that_never_answers_is_waited_for_briefly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # of the thread that is left behind
    with deaf_server() as uri:
        started = time.monotonic()
        with training(Tracker(uri), last_seconds=0.5) as curves:
            curves(1, {"train_loss": 1.0})
            assert time.monotonic() - started < 0.3
        assert time.monotonic() - started < 5
    (warning,) = warnings(caplog)
    assert "has not answered" in warning


def test_who_was_not_waited_for_logs_nothing_later(tracker: Tracker) -> None:
    """Or it might say of a run that was recorded meanwhile that it is under way."""
    with flocked(lock_file(tracker.uri)):
        with training(tracker, "late", last_seconds=0.3) as curves:
            curves(1, {"train_loss": 1.0})
        (late,) = [thread for thread in threading.enumerate() if thread.name == "curves of late"]
    late.join(30)
    assert not late.is_alive()
    assert runs(tracker) == []


def test_what_mlflow_refused_is_logged_when_it_takes_points_again(
    tmp_path: Path, blank_mlflow: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"no database" * 500)
    mended = Tracker(f"sqlite:///{database}")
    with training(mended, interval_seconds=0.05, patience_seconds=0.2) as curves:
        curves(1, {"train_loss": 1.0})
        until(lambda: warnings(caplog))
        curves(2, {"train_loss": 0.5})
        shutil.copyfile(blank_mlflow, database)
        until(lambda: runs(mended) and len(history(mended, "train_loss")) == 2)
        curves(3, {"train_loss": 0.3})
    assert history(mended, "train_loss") == [(1, 1.0), (2, 0.5), (3, 0.3)]
    assert len(warnings(caplog)) == 1
    assert "KeyError" not in warnings(caplog)[0]


def test_a_mistake_of_ours_is_named_and_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    def broken(points: Sequence[MetricPoint], over: threading.Event) -> None:
        raise KeyError("nobody expected this")

    with LiveCurves(broken, "lora") as curves:
        curves(1, {"train_loss": 1.0})
    (warning,) = warnings(caplog)
    assert "KeyError: 'nobody expected this'" in warning
