"""kill -9 in a stage, then the same command: nothing that was finished runs again, and the result is equal."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.outcome import RunResult, StageOutcome
from infra.artifacts import ArtifactRef
from tests.flows.home import Home, stages_run

pytestmark = pytest.mark.slow

#: enough windows and steps that both stages take seconds; a checkpoint of the training after every other step
SPEC = [
    "name=killed",
    "calibration.num_samples=400",
    "calibration.seq_len=128",
    "steps.0.split=equal",
    "steps.1.max_steps=20",
    "steps.1.save_steps=2",
    "steps.1.learning_rate=0.01",
    "evals=[{suite: perplexity, dataset: slimline/wikipedia, config: null, windows: [64], max_windows: 8}]",
    "profile=null",
]
COMMAND = ["run", "smoke", *(part for override in SPEC for part in ("--set", override))]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, offline_root: Path, prefect_server: str, blank_mlflow: Path
) -> tuple[Home, RunResult]:
    home = Home.create(tmp_path_factory.mktemp("whole") / "home", offline_root, prefect_server, blank_mlflow)
    return home, home.run("smoke", SPEC)


def named(result: RunResult, name: str) -> StageOutcome:
    (stage,) = [stage for stage in result.stages if stage.name.startswith(name)]
    return stage


def kill_when(home: Home, reached: Callable[[], bool]) -> None:
    """Start the command and kill it -9 as soon as `reached`."""
    child = home.start(*COMMAND)
    try:
        deadline = time.monotonic() + 120
        while not reached():
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -9


def assert_equal_results(home: Home, whole: tuple[Home, RunResult]) -> None:
    """Every file of every artifact, and every figure, is that of the run that nobody killed."""
    first, result = whole
    for stage in result.stages:
        mine = home.store.manifest(_ref(stage))
        theirs = first.store.manifest(_ref(stage))
        timed = {"pruning.json"}  # it says how many seconds each layer took
        assert mine.files.keys() == theirs.files.keys()
        assert {mine.files[name].sha256 for name in mine.files.keys() - timed} == {
            theirs.files[name].sha256 for name in theirs.files.keys() - timed
        }, stage.name
        assert home.store.verify(mine.ref) == []
    assert len(home.results.runs()) == 1
    assert home.results.runs()[0].status == "completed"
    assert home.results.metrics() == first.results.metrics()
    untimed = [
        [row.model_copy(update={"seconds": None}) for row in store.layers(result.run_key)]
        for store in (home.results, first.results)
    ]
    assert untimed[0] == untimed[1]


def _ref(stage: StageOutcome) -> ArtifactRef:
    return ArtifactRef(kind=stage.kind, key=stage.key)


def test_killed_in_prune(home: Home, uninterrupted: tuple[Home, RunResult]) -> None:
    pruned = named(uninterrupted[1], "prune")

    scratch = home.store.root / ".scratch" / pruned.key

    def pruned_a_bit() -> bool:
        return any(scratch.rglob("layer-00001.json"))

    kill_when(home, pruned_a_bit)
    # a mark on the first layer's page, where nothing but the time is said: who prunes it again leaves no trace of it
    page = next(scratch.rglob("layer-00000.json"))
    content = json.loads(page.read_bytes())
    content["entry"]["reports"][-1]["seconds"] = 4321.0
    page.write_text(json.dumps(content))
    assert not (home.store.root / "checkpoint" / pruned.key).exists()
    assert home.results.runs() == ()
    finished = {path.name for kind in ("checkpoint", "calibration") for path in (home.store.root / kind).iterdir()}
    assert finished == {named(uninterrupted[1], name).key for name in ("import", "calibrate")}
    again = home.slimline(*COMMAND)
    assert not {"import-model", "calibrate"} & set(stages_run(again.stderr))
    assert {"prune:slimgpt-20", "recover:slimgpt-20+lora"} <= set(stages_run(again.stderr))
    assert not list(home.store.root.glob(".writing/*"))
    assert not scratch.exists()
    reports = json.loads((home.store.root / "checkpoint" / pruned.key / "pruning.json").read_bytes())["layers"]
    assert [report["layer"] for report in reports if report["seconds"] == 4321.0] == [0]
    assert_equal_results(home, uninterrupted)


def test_killed_in_recover(tmp_path: Path, uninterrupted: tuple[Home, RunResult], blank_mlflow: Path) -> None:
    """The home is that of a run that got as far as this stage. The training goes on from its own last checkpoint."""
    home = uninterrupted[0].copy(tmp_path / "home")
    recovered = named(uninterrupted[1], "recover")
    for stage in uninterrupted[1].stages:
        if "+lora" in stage.name:
            shutil.rmtree(home.store.root / stage.kind / stage.key)
    for name in ("results.duckdb", "mlflow.db"):
        (home.folder / name).unlink()
    shutil.rmtree(home.folder / "results")
    shutil.copyfile(blank_mlflow, home.folder / "mlflow.db")
    scratch = home.store.root / ".scratch" / recovered.key

    def trained_a_bit() -> bool:
        return len(list(scratch.glob("checkpoint-*/trainer_state.json"))) >= 2

    kill_when(home, trained_a_bit)
    assert not (home.store.root / "checkpoint" / recovered.key).exists()
    assert scratch.exists()
    again = home.slimline(*COMMAND)
    assert set(stages_run(again.stderr)) == {stage.name for stage in uninterrupted[1].stages if "+lora" in stage.name}
    assert not scratch.exists()
    assert_equal_results(home, uninterrupted)
