"""kill -9 or SIGTERM in a stage, then the same command: what was finished does not run again, the result is equal."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flows.run.outcome import RunResult, StageOutcome
from infra.artifacts.store import ArtifactRef
from tests.flows.home import Home, stages_run
from tests.flows.serving import alive_in, wait_for

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
        timed = {"pruning.json", "recovery.json"}  # how many seconds each layer took, and how fast it was
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


def before_recovery(whole: tuple[Home, RunResult], folder: Path, blank_mlflow: Path) -> Home:
    """The home of a run that got as far as the training."""
    home = whole[0].copy(folder)
    for stage in whole[1].stages:
        if "+lora" in stage.name:
            shutil.rmtree(home.store.root / stage.kind / stage.key)
    for name in ("results.duckdb", "mlflow.db"):
        (home.folder / name).unlink()
    shutil.rmtree(home.folder / "results")
    shutil.copyfile(blank_mlflow, home.folder / "mlflow.db")
    return home


@pytest.mark.long
def test_killed_in_recover(tmp_path: Path, uninterrupted: tuple[Home, RunResult], blank_mlflow: Path) -> None:
    """The training goes on from its own last checkpoint."""
    home = before_recovery(uninterrupted, tmp_path / "home", blank_mlflow)
    recovered = named(uninterrupted[1], "recover")
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


def ended(home: Home, reached: Callable[[], bool], *numbers: signal.Signals, more: Sequence[str] = ()) -> str:
    """Start the command, send it the signals as soon as `reached`, and return what it said."""
    child = home.start(*COMMAND, *more)
    try:
        wait_for(reached, 120)
        for number in numbers:
            child.send_signal(number)
            time.sleep(0.1)  # longer, and what the first one ends could be over before the second
        errors = child.communicate(timeout=10 if numbers[1:] else 60)[1]
    finally:
        child.kill()
    assert child.returncode == 1, errors
    assert f"slimline: ended by {numbers[0].name}; running stages end as soon as they can go on from there" in errors
    assert "Traceback" not in errors
    return errors


@pytest.mark.long
def test_ended_by_sigterm_in_recover(tmp_path: Path, uninterrupted: tuple[Home, RunResult], blank_mlflow: Path) -> None:
    """The training saves the step that it is at, between its own checkpoints or not, and goes on from there."""
    home = before_recovery(uninterrupted, tmp_path / "home", blank_mlflow)
    recovered = named(uninterrupted[1], "recover")
    scratch = home.store.root / ".scratch" / recovered.key
    errors = ended(home, lambda: any(scratch.glob("checkpoint-*/complete.json")), signal.SIGTERM)
    reached = re.search(r"interrupted at step (\d+)/20, loss .*; the same command goes on from here", errors)
    assert reached, errors
    steps = {int(path.parent.name.partition("-")[2]) for path in scratch.glob("checkpoint-*/complete.json")}
    assert max(steps) == int(reached[1])
    assert not (home.store.root / "checkpoint" / recovered.key).exists()
    assert home.results.runs() == ()
    assert not list((home.folder / "interrupted").iterdir())
    home.slimline(*COMMAND)
    assert_equal_results(home, uninterrupted)


@pytest.mark.long
def test_ended_by_sigterm_in_prune(home: Home, uninterrupted: tuple[Home, RunResult]) -> None:
    scratch = home.store.root / ".scratch" / named(uninterrupted[1], "prune").key
    errors = ended(home, lambda: any(scratch.rglob("layer-00000.json")), signal.SIGTERM)
    assert "prune:slimgpt-20: interrupted at layer " in errors
    assert any(scratch.rglob("layer-00000.json"))
    home.slimline(*COMMAND)
    assert_equal_results(home, uninterrupted)


def test_a_second_signal_leaves_no_process(home: Home) -> None:
    """Not those that share a pruning either."""
    home.variables["SLIMLINE_WALK_PROCESSES"] = "2"
    scratch = home.store.root / ".scratch"
    longer = ["--set", "steps.0.split=auto"]
    errors = ended(home, lambda: any(scratch.rglob("process-1-of-2")), signal.SIGHUP, signal.SIGTERM, more=longer)
    assert "slimline: dropped what still ran" in errors
    wait_for(lambda: alive_in(home) == [], 10)
