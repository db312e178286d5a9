"""A real MLflow server: what is recorded over HTTP is what is recorded in a file, and its pages show it in Chromium.

Screenshots lie in build/screenshots afterwards.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.runtime.servers import Server
from infra.errors import TrackingUnusable
from infra.tracking.live import LiveCurves
from infra.tracking.records import CheckpointRecord, DataInput, MetricPoint, RunContent, RunRecord
from infra.tracking.saved_view import TAG
from infra.tracking.tracker import LiveRun, Tracker
from tests.chromium import browser as browser
from tests.infra.tracking.door import Door
from tests.infra.tracking.test_live import until
from tests.infra.tracking.test_tracker import client, experiment_id

if TYPE_CHECKING:
    from mlflow.entities import Run
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.server]

ROOT = Path(__file__).parents[3]
SCREENSHOTS = ROOT / "build" / "screenshots"
PPL, ACC = "perplexity/wikitext2/ppl@128", "zero_shot/average/acc"
BEGAN_MS = 1_760_000_000_000
ODD = "größe <script>alert(1)</script>"
#: the machine of the tests may be busy
PATIENCE_SECONDS = 300.0
JOBS = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, blank_mlflow: Path) -> Iterator[str]:
    """Its URL. It has an SQLite file and keeps the runs' files itself, as one for several machines does."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(blank_mlflow, folder / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    # without the eight processes of its jobs, which concern traces
    started = Server("MLflow", [*command, *places], os.environ | {JOBS: "false"}, "SIGTERM")
    try:
        assert started.wait_until_healthy(f"http://127.0.0.1:{port}", PATIENCE_SECONDS), "it did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        started.stop()


def checkpoint(label: str, sparsity: str, recovery: str, ppl: float, folder: Path, **content: Any) -> CheckpointRecord:
    folder.mkdir(parents=True, exist_ok=True)
    method = "none" if sparsity == "0" else "slimgpt"
    params = {"model": "org/tiny", "method": method, "sparsity": sparsity, "recovery": recovery}
    # the last has no accuracy: a metric may be missing in some runs
    points = [MetricPoint(PPL, ppl), *([MetricPoint(ACC, 0.6 - ppl / 1000)] if recovery == "none" else [])]
    points += [MetricPoint("layers/mlp_error", 0.01 * layer, layer) for layer in range(4) if sparsity != "0"]
    points += [MetricPoint("training/train_loss", 3 / (step + 1), step) for step in range(1, 9) if recovery != "none"]
    inputs = [DataInput("allenai/c4", "c" * 64, "calibration", {"path": "allenai/c4", "split": "train"})]
    described = f"**{label.replace('<', '&lt;')}**\n\n| figure | value |\n| --- | --- |\n| ppl@128 | {ppl} |"
    whole = RunContent(
        label, params=params, metrics=points, inputs=inputs, description=described, artifacts={"plan.json": "{}"},
        began_ms=BEGAN_MS, ended_ms=BEGAN_MS + 100_000, **content,
    )  # fmt: skip
    return CheckpointRecord(label, folder.name, whole, folder)


def demo(store: Path) -> RunRecord:
    made = [
        checkpoint("dense", "0", "none", 12.5, store / "import-v1-0"),
        checkpoint("slimgpt-20", "0.2", "none", 20.5, store / "prune-v1-0"),
        checkpoint("slimgpt-20+lora", "0.2", "lora", 16.25, store / "recover-v1-0"),
        checkpoint(ODD, "0.5", "none", math.nan, store / "prune-v1-1"),
    ]
    description = "Made smaller.\n\n| checkpoint | ppl@128 |\n| --- | --- |\n| dense | 12.5 |"
    content = RunContent("demo", description=description, artifacts={"spec.json": "{}"}, began_ms=BEGAN_MS)
    aliases = {"best-20pct": "slimgpt-20+lora", "last-good": "slimgpt-20+lora"}
    return RunRecord("run-demo-v1-0", content, made, aliases, columns=[PPL, ACC])


def recorded(uri: str, experiment: str, store: Path) -> Tracker:
    """The demo in an experiment of its own, a curve of it while it was trained."""
    tracker = Tracker(uri, experiment)
    with LiveCurves(LiveRun(tracker, "run-demo-v1-0", "demo", "slimgpt-20+lora", BEGAN_MS).log, "lora") as curves:
        for step in range(1, 5):
            curves(step, {"train_loss": 3 / (step + 1)})
        curves(0, {"mlp_error": 0.0}, "layers")
    for _ in range(2):
        tracker.record(demo(store))
    return tracker


def seen(tracker: Tracker) -> dict[str, Any]:
    """All that a tracker's experiment holds, without ids and moments."""
    mlflow, experiment = client(tracker), experiment_id(tracker)
    runs = mlflow.search_runs([experiment])
    names = {run.info.run_id: run.info.run_name for run in runs}
    models = mlflow.search_logged_models([experiment])
    described = {model.model_id: (model.name, model.tags["slimline.folder"], dict(model.params)) for model in models}
    return {
        "kind": mlflow.get_experiment(experiment).tags["mlflow.experimentKind"],
        "view": mlflow.get_experiment(experiment).tags[TAG].partition("state")[2],
        "runs": {run.info.run_name: what_a_run_holds(mlflow, run, names, described) for run in runs},
        "aliases": {
            alias: mlflow.get_model_version_by_alias("demo", alias).description for alias in ("best-20pct", "last-good")
        },
        "versions": {each.tags["slimline.checkpoint_key"] for each in mlflow.search_model_versions("name='demo'")},
    }


def what_a_run_holds(mlflow: Any, run: Run, names: dict[str, str], models: dict[str, Any]) -> dict[str, Any]:
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    points = {
        key: sorted((point.step, repr(point.value)) for point in mlflow.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }
    inputs = [(each.dataset.name, each.dataset.digest, each.dataset.source_type) for each in run.inputs.dataset_inputs]
    said = run.data.tags["mlflow.note.content"]
    return {
        "above": names.get(run.data.tags.get("mlflow.parentRunId", "")),
        "params": run.data.params,
        "points": points,
        "tags": tags,
        "status": (run.info.status, run.info.start_time if run.info.run_name != "slimgpt-20+lora" else None),
        "inputs": inputs,
        "description": said.rpartition("workflowType")[2],
        "files": [file.path for file in mlflow.list_artifacts(run.info.run_id)],
        "models": [models[each.model_id] for each in (run.outputs.model_outputs if run.outputs else ())],
    }


def test_over_http_there_is_what_is_in_a_file(server: str, blank_mlflow: Path, tmp_path: Path) -> None:
    """Also when it is recorded twice: nothing is doubled. Infinity and NaN are in it."""
    shutil.copyfile(blank_mlflow, tmp_path / "mlflow.db")
    in_file = seen(recorded(f"sqlite:///{tmp_path / 'mlflow.db'}", "same", tmp_path / "store"))
    over_http = seen(recorded(server, "same", tmp_path / "store"))
    assert over_http == in_file
    assert set(over_http["runs"]) == {"demo", "dense", "slimgpt-20", "slimgpt-20+lora", ODD}
    lora = over_http["runs"]["slimgpt-20+lora"]
    assert lora["above"] == "demo"
    assert [step for step, _ in lora["points"]["training/train_loss"]] == list(range(1, 9)), "none of them twice"
    assert [name for name, _, _ in lora["models"]] == ["slimgpt-20+lora"]
    assert over_http["aliases"] == {"best-20pct": "slimgpt-20+lora", "last-good": "slimgpt-20+lora"}
    assert len(over_http["versions"]) == 4


def test_a_server_that_is_gone_is_said_and_keeps_what_it_had(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = Tracker(f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(TrackingUnusable, match=r"did not take run run-demo-v1-0.*finished stages are not repeated"):
        gone.record(demo(tmp_path / "store"))


def test_a_server_that_dies_while_a_run_goes_on_gets_everything_when_it_is_back(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    door = Door(server)
    tracker, run = Tracker(door.url, "dies"), demo(tmp_path / "store")
    live = LiveRun(tracker, run.run_key, "demo", "slimgpt-20+lora", BEGAN_MS)
    with LiveCurves(live.log, "lora", interval_seconds=0.02) as curves:
        curves(1, {"train_loss": 1.5})
        until(lambda: "slimgpt-20+lora" in {each.info.run_name for each in all_runs(server, "dies")})
        door.shut()
        for step in range(2, 5):
            curves(step, {"train_loss": 3 / (step + 1)})
            time.sleep(0.05)
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert warning.startswith("the curves of lora are not shown while they grow")
    with pytest.raises(TrackingUnusable, match="did not take run run-demo-v1-0"):
        tracker.record(run)
    door.open()
    tracker.record(run)
    found = seen(Tracker(server, "dies"))["runs"]
    assert set(found) == {"demo", "dense", "slimgpt-20", "slimgpt-20+lora", ODD}
    points = found["slimgpt-20+lora"]["points"]["training/train_loss"]
    assert points == [(step, repr(3 / (step + 1))) for step in range(1, 9)], "each once"
    door.shut()


def all_runs(uri: str, experiment: str) -> list[Run]:
    tracker = Tracker(uri, experiment)
    there = client(tracker).get_experiment_by_name(experiment)
    return list(client(tracker).search_runs([there.experiment_id])) if there else []


@pytest.fixture(scope="module")
def pages(server: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return recorded(server, "slimline", tmp_path_factory.mktemp("pages") / "store")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of a browser that was here before: MLflow's assistant is not opened in it."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    context.set_default_timeout(1000 * PATIENCE_SECONDS)
    opened = context.new_page()
    opened.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    yield opened
    context.close()


def followed(page: Page, link: str) -> Page:
    """The tab that a link of a description opens."""
    with page.context.expect_page() as opened:
        page.get_by_role("link", name=link).first.click()
    return opened.value


def shot(page: Page, name: str) -> None:
    """Keep a picture of the page and say where."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"mlflow-{name}.png"
    page.screenshot(path=path)
    sys.stdout.write(f"screenshot: {path}\n")


def test_the_table_shows_all_checkpoints_with_their_columns(pages: Tracker, page: Page) -> None:
    page.goto(f"{pages.uri}/#/experiments/{experiment_id(pages)}/runs?workflowType=machine_learning")
    page.get_by_role("link", name="demo", exact=True).first.wait_for()
    shot(page, "runs")
    page = followed(page, "All checkpoints in one table")
    page.get_by_role("link", name="slimgpt-20+lora").first.wait_for()
    for heading in ("method", "sparsity", "recovery", "ppl_128", "acc"):
        page.locator("[role=columnheader]").filter(has_text=heading).first.wait_for()
    shown = page.locator("[role=grid], [role=treegrid], .ag-root").first.inner_text()
    for text in (ODD, "dense", "slimgpt", "0.2"):
        assert text in shown
    shot(page, "checkpoints")


def test_checkpoints_are_compared_side_by_side(pages: Tracker, page: Page) -> None:
    (run,) = client(pages).search_runs([experiment_id(pages)], "tags.`slimline.run_key` = 'run-demo-v1-0'")
    page.goto(f"{pages.uri}/#/experiments/{experiment_id(pages)}/runs/{run.info.run_id}?workflowType=machine_learning")
    page.get_by_role("link", name="Compare the checkpoints").first.wait_for()
    shot(page, "run")
    page = followed(page, "Compare the checkpoints")
    page.get_by_text("Parallel Coordinates Plot").first.wait_for()
    page.locator("svg .parcoords, .parcoords").first.wait_for()
    for text in ("slimgpt-20", "slimgpt-20+lora", ODD, "ppl_128", "16.25", "sparsity"):
        page.get_by_text(text).first.wait_for(state="attached")
    shot(page, "compare")


def test_a_training_has_its_curve(pages: Tracker, page: Page) -> None:
    found = client(pages).search_runs([experiment_id(pages)], "tags.`slimline.checkpoint` = 'slimgpt-20+lora'")
    page.goto(
        f"{pages.uri}/#/experiments/{experiment_id(pages)}/runs/{found[0].info.run_id}/model-metrics"
        "?workflowType=machine_learning"
    )
    page.get_by_placeholder("Search metric charts").fill("train_loss")  # charts are drawn when they come into sight
    page.locator(".scatterlayer .trace").first.wait_for(state="attached")
    shot(page, "curve")
