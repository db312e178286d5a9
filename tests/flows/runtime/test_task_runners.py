"""The same spec on threads, Dask and Ray: the same artifacts and figures; interrupts and dead processes included."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow, task

from flows.errors import SpecError
from flows.run.compress import compress
from flows.run.outcome import RunResult
from flows.runtime.task_runners import RunnerName, check_runner, create_runner, final_state, interruptible
from flows.spec.load import load_spec
from infra.artifacts.store import ArtifactRef
from infra.errors import SettingsInvalid
from infra.settings import Settings
from tasks.execution.interrupts import refuse_elsewhere, refuse_interrupted
from tests.flows.home import Home
from tests.flows.serving import wait_for
from tests.infra.processes import start

#: of the smoke spec: its pruning and one suite
_SUITE = "{suite: perplexity, dataset: slimline/wikipedia, config: null, windows: [64], max_windows: 8}"
OVERRIDES = ("profile=null", "steps=[{method: slimgpt, sparsity: 0.2}]", f"evals=[{_SUITE}]")
NEEDS = {"dask": "prefect_dask", "ray": "prefect_ray"}


def figures(result: RunResult) -> dict[tuple[str, str, str], float]:
    """Of the suite; those of a profile are times."""
    return {(row.checkpoint, row.task, row.metric): row.value for row in result.metrics if row.suite == "perplexity"}


def hashes(home: Home, result: RunResult) -> dict[str, str]:
    """Of every file that holds no times."""
    return {
        f"{stage.key}/{name}": entry.sha256
        for stage in result.stages
        for name, entry in home.store.manifest(ArtifactRef(kind=stage.kind, key=stage.key)).files.items()
        if name != "pruning.json"
    }


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_cluster_gives_what_threads_give(name: RunnerName, smoke: tuple[Home, RunResult], home: Home) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    there, threads = smoke
    with home.lived_in():
        runner = create_runner(name, Settings(runner_workers=1))
        result = compress.with_options(task_runner=runner)(load_spec("smoke", OVERRIDES))
    assert {stage.status for stage in result.stages} == {"completed"}
    assert {stage.status for stage in home.run("smoke", OVERRIDES).stages} == {"cached"}
    assert figures(result).items() <= figures(threads).items()
    assert len(figures(result)) >= 2
    assert hashes(home, result).items() <= hashes(there, threads).items()


@task
def pid() -> int:
    return os.getpid()


@task
def dies() -> None:
    os._exit(9)


@task
def slow(folder: Path) -> None:
    (folder / "begun").touch()
    time.sleep(1)
    (folder / "finished").touch()


@task
def late(folder: Path) -> None:
    refuse_interrupted(Settings())
    (folder / "late").touch()


def _interrupt_when(reached: Callable[[], bool]) -> None:
    while not reached():
        time.sleep(0.05)
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["threads", "dask"])
def test_interrupted_a_flow_finishes_what_runs_and_begins_nothing(
    name: RunnerName, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prefect_dask")
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path))

    @flow(task_runner=create_runner(name, Settings(runner_workers=1)))
    def interrupted() -> None:
        assert (pid.submit().result() == os.getpid()) == (name == "threads")
        with interruptible() as submitted:
            submitted.append(slow.submit(tmp_path))
            submitted.append(late.submit(tmp_path, wait_for=submitted[:]))
            _interrupt_when((tmp_path / "begun").exists)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "finished").exists()
    assert not (tmp_path / "late").exists()
    assert not list((tmp_path / "interrupted").iterdir())


_ENDED = """
import sys, time
from pathlib import Path
from prefect import flow, task
from flows.runtime import interrupts as interrupt
from flows.runtime import task_runners as runners
from tasks.execution.interrupts import something_to_save

runners._PATIENCE = 0.5
folder = Path(sys.argv[1])

@task
def long(name, seconds, saves):
    (folder / name).touch()
    if saves:
        with something_to_save():
            time.sleep(seconds)
        (folder / "saved").touch()
    time.sleep(60)

@flow
def ended():
    with runners.interruptible() as submitted:
        submitted.append(long.submit("saving", 3, True))
        submitted.append(long.submit("waiting", 0, False))
        for future in submitted:
            future.wait()

with interrupt.interruptible_command():
    ended()
"""


def test_ended_by_sigterm_what_has_nothing_to_save_is_not_waited_for(prefect_server: str, tmp_path: Path) -> None:
    """As a stage that waits for a lock, or downloads."""
    child = start(_ENDED, tmp_path, PREFECT_API_URL=prefect_server, SLIMLINE_HOME=str(tmp_path))
    wait_for(lambda: (tmp_path / "saving").exists() and (tmp_path / "waiting").exists(), 60)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 1, errors
    assert "slimline: ended by SIGTERM" in errors
    assert "slimline: dropped what still ran: it had nothing to save" in errors
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(importlib.util.find_spec("prefect_dask") is None, reason="prefect-dask is not installed")
def test_a_process_that_always_dies_is_a_failed_stage(prefect_server: str) -> None:
    import dask

    @flow(task_runner=create_runner("dask", Settings(runner_workers=1)))
    def dying() -> None:
        state = final_state(dies.submit())
        assert state.is_failed()
        assert type(state.result(raise_on_failure=False)).__name__ == "KilledWorker"

    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        dying()


def test_an_address_needs_a_cluster() -> None:
    with pytest.raises(SpecError, match="SLIMLINE_RUNNER_ADDRESS=tcp://x:1 names a cluster"):
        check_runner("threads", Settings(runner_address="tcp://x:1"))


def test_a_cluster_that_runs_has_its_size() -> None:
    pytest.importorskip("prefect_dask")
    with pytest.raises(SpecError, match="SLIMLINE_RUNNER_WORKERS=2"):
        check_runner("dask", Settings(runner_address="tcp://x:1", runner_workers=2))


def test_a_runner_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'slimline\[ray\]'"):
        create_runner("ray", Settings())


def test_a_process_of_another_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "here"))
    refuse_elsewhere(Settings())
    with pytest.raises(SettingsInvalid, match=r"here and the flow has .*there; start the cluster"):
        refuse_elsewhere(Settings(home=tmp_path / "there"))
