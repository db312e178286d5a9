"""A real run followed while it runs: what it writes, what `slimline watch` tells of it, what Prefect calls it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.run.names import run_title
from flows.run.outcome import StagesFailed
from flows.spec.load import load_spec
from flows.watch.forecast import recorded_timings
from flows.watch.screen import follow
from flows.watch.state import Watcher
from infra.offline.default import OfflineDefault
from infra.running.files import FollowedRun, RunningFiles
from tests.flows.home import Home
from tests.flows.models import with_nan

pytestmark = pytest.mark.slow

SMALL = [
    "steps=[{method: magnitude, sparsity: 0.2, name: small}]",
    "evals=[]",
    "profile=null",
    "calibration.num_samples=2",
]


def followed(home: Home, *overrides: str) -> tuple[list[str], list[int]]:
    """What is told of a run of the smoke spec, and the exit code."""
    files, said, codes = RunningFiles(home.settings.home), list[str](), list[int]()

    def watch() -> None:
        deadline = time.monotonic() + 300
        while not (running := files.runs()) and time.monotonic() < deadline:
            time.sleep(0.05)
        watcher = Watcher(files, home.store, recorded_timings(home.results))
        codes.append(follow(watcher, running[-1], said.append))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    with suppress(StagesFailed):
        home.run("smoke", [*SMALL, *overrides])
    watching.join(300)
    return said, codes


def told(home: Home) -> FollowedRun:
    return RunningFiles(home.settings.home).runs()[-1]


def test_a_run_is_followed_to_its_end(home: Home) -> None:
    said, codes = followed(home)
    assert codes == [0]
    assert " 4 stages: " in said[0]
    for name in ("import-model", "calibrate", "order:dense", "prune:small"):
        assert any(f"{name}: done in " in line for line in said), said
    assert " completed after " in said[-1]
    run = told(home)
    assert [stage.status for stage in run.stages] == ["completed"] * 4
    assert not list((home.settings.home / "running" / "stages").iterdir())
    (recorded,) = home.results.runs()
    assert (run.key, run.id, run.part_of) == (recorded.run_key, recorded.prefect_run_id, None)
    with get_client(sync_client=True) as client:
        (flow_run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))  # type: ignore[list-item]
        names = {task_run.name for task_run in client.read_task_runs() if str(task_run.flow_run_id) == run.id}
    assert flow_run.name == "smoke: magnitude 20 %"
    assert "prune:small (magnitude 20 %)" in names


def test_a_run_that_fails_is_followed_to_its_exit_code(home: Home, offline_root: Path, tmp_path: Path) -> None:
    model = with_nan(OfflineDefault(offline_root).folder("slimline/tiny-random-llama"), tmp_path / "nan")
    said, codes = followed(home, f"model.id={model}")
    assert codes == [2]
    assert " ended with exit code 2 after " in said[-1]
    assert [stage.status for stage in told(home).stages] == ["failed", "skipped", "skipped", "skipped"]
    failed = told(home).stages[0]
    assert failed.message
    assert failed.message in said[-1]
    assert any("import-model: failed: " in line for line in said)


def test_a_title_tells_methods_and_sparsities() -> None:
    steps = "steps=[{method: slimgpt, sparsity: [0.2, 0.5, 0.255]}, {recovery: lora}]"
    assert run_title(load_spec("smoke", [steps])) == "smoke: slimgpt 20, 50 and 25.5 %, lora"
    assert run_title(load_spec("smoke", ["steps=[]"])) == "smoke: dense"
