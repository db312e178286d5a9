"""A stage that trains shows its curves in the MLflow run of its run, and nowhere if it has none."""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from infra.settings import Settings
from infra.sources.find import Sources
from tasks.execution import stage
from tasks.execution.context import RunContext, StageContext
from tasks.execution.curves import InRun, live_curves, no_curves
from tasks.execution.stage import run_stage
from tests.infra.tracking.test_live import until
from tests.tasks.execution.test_stage import REQUEST

pytestmark = pytest.mark.slow  # not in `make test-fast`

IN_RUN = InRun("run-demo-v1-0", "demo", "slimgpt-20+lora")
LOSS = "training/train_loss"


@pytest.fixture
def run_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_mlflow: Path) -> RunContext:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(blank_mlflow, home / "mlflow.db")
    monkeypatch.setenv("SLIMLINE_HOME", str(home))
    settings = Settings(device="cpu")
    return RunContext(settings, Sources((), None, False, home=home), in_run=IN_RUN)


def runs(run_context: RunContext) -> list[Run]:
    """Those of checkpoints."""
    client = MlflowClient(run_context.settings.tracking_uri)
    experiment = client.get_experiment_by_name("slimline")
    found = [] if experiment is None else client.search_runs([experiment.experiment_id])
    return [run for run in found if "slimline.checkpoint" in run.data.tags]


def test_the_curves_of_a_stage_grow_while_it_runs(run_context: RunContext) -> None:
    seen: list[Run] = []

    def fill(request: object, context: StageContext) -> None:
        context.curves(1, {"train_loss": 2.5, "grad_norm": 1.0})
        until(lambda: [run for run in runs(run_context) if run.data.metrics])
        seen.extend(runs(run_context))
        context.curves(2, {"train_loss": 2.25})
        (context.folder / "answer.txt").write_text("42", encoding="utf-8")

    made = run_stage(REQUEST, "recover", pickle.loads(pickle.dumps(run_context)), fill, devices="none")
    (early,) = seen
    assert (early.info.status, early.info.run_name) == ("RUNNING", "slimgpt-20+lora")
    assert early.data.metrics == {LOSS: 2.5, "training/grad_norm": 1.0}
    (run,) = runs(run_context)
    assert run.data.metrics[LOSS] == 2.25
    assert made.ref == REQUEST.ref, "where it is shown is in no key"
    assert set(run_context.store.manifest(made.ref).request) == set(REQUEST.model_dump())


def test_a_stage_that_fails_has_shown_how_far_it_came(run_context: RunContext) -> None:
    def fill(request: object, context: StageContext) -> None:
        context.curves(7, {"train_loss": 9.0})
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        run_stage(REQUEST, "recover", run_context, fill, devices="none")
    (run,) = runs(run_context)
    assert (run.info.status, run.data.metrics) == ("RUNNING", {LOSS: 9.0})


def test_a_stage_of_no_run_shows_nothing(run_context: RunContext) -> None:
    given: list[object] = []

    def fill(request: object, context: StageContext) -> None:
        given.append(context.curves)
        context.curves(1, {"train_loss": 2.5})
        (context.folder / "answer.txt").write_text("42", encoding="utf-8")

    run_stage(REQUEST, "recover", replace(run_context, in_run=None), fill, devices="none")
    assert given == [no_curves]
    assert runs(run_context) == []


def test_mlflow_that_cannot_be_used_does_not_stop_a_stage(
    run_context: RunContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.db").write_bytes(b"no database" * 500)
    settings = run_context.settings.model_copy(update={"mlflow_uri": f"sqlite:///{tmp_path}/broken.db"})

    def fill(request: object, context: StageContext) -> None:
        for step in range(1, 4):
            context.curves(step, {"train_loss": 1 / step})
        (context.folder / "answer.txt").write_text("42", encoding="utf-8")

    made = run_stage(REQUEST, "recover", replace(run_context, settings=settings), fill, devices="none")
    assert run_context.store.has(made.ref)
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert "broken.db" in warning


def test_mlflow_is_imported_in_turn(run_context: RunContext) -> None:
    """Two threads that import at once can see half of a library; the training does not wait for the turn."""
    turn = threading.Lock()
    with turn:
        with live_curves(run_context.settings, IN_RUN, turn) as curves:
            started = time.monotonic()
            curves(1, {"train_loss": 2.5})
            assert time.monotonic() - started < 0.2
            time.sleep(0.3)
            assert runs(run_context) == []
            threading.Timer(0.1, turn.release).start()
        (run,) = runs(run_context)
        assert run.data.metrics == {LOSS: 2.5}
        turn.acquire()


def test_a_stage_waits_for_the_lock_of_all_imports(run_context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[object] = []

    def fill(request: object, context: StageContext) -> None:
        (context.folder / "answer.txt").write_text("42", encoding="utf-8")

    monkeypatch.setattr(stage, "live_curves", lambda *given: held.append(given[2]) or live_curves(*given))
    run_stage(REQUEST, "recover", run_context, fill, devices="none")
    assert held == [stage.importing]
