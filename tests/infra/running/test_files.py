"""The files that say what runs: whole or absent, told from those of the dead, and never worth a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.running.files import FollowedRun, RunningFiles, RunningStage, StageOfRun, ended

NAME = "Läufe/a b <script>"


def run(id_: str = "one", **fields: object) -> FollowedRun:
    stage = StageOfRun(name="prune:small", key="prune-x-v1-00", kind="checkpoint")
    known = {"id": id_, "kind": "run", "key": f"run-{id_}", "name": NAME, "stages": (stage,)}
    return FollowedRun.model_validate(known | fields)


@pytest.fixture
def files(tmp_path: Path) -> RunningFiles:
    return RunningFiles(tmp_path)


def test_a_run_is_alive_until_its_block_ends(files: RunningFiles) -> None:
    with files.following(run()) as write:
        (found,) = files.runs()
        assert found == files.run("one")
        assert found.name == NAME
        assert files.is_alive(found)
        write(ended(found, 2, "no"))
    (after,) = files.runs()
    assert (after.exit_code, after.message, after.stages) == (2, "no", found.stages)
    assert not files.is_alive(after)
    assert not list(files.folder.rglob("*.lock"))


def test_a_run_that_is_looked_at_all_the_time_begins_all_the_same(files: RunningFiles) -> None:
    with files.following(run()):
        (found,) = files.runs()
        for _ in range(100):
            assert files.is_alive(found)


def test_a_killed_run_is_not_alive(files: RunningFiles, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from infra.running.files import FollowedRun, RunningFiles\n"
        "run = FollowedRun(id='one', kind='run', key='run-one', name='n')\n"
        "with RunningFiles(Path(sys.argv[1])).following(run):\n"
        "    print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "up\n"
        (found,) = files.runs()
        assert files.is_alive(found)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not files.is_alive(found)
    assert files.run("one") == found


def test_a_stage_tells_how_far_it_is_and_leaves_nothing(files: RunningFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.running.files._INTERVAL", 0.0)
    with files.making("prune:small", "prune-x-v1-00") as tell:
        tell(float("nan"), "not known")
        assert files.stage("prune-x-v1-00") is not None
        tell(1.5, "layer 3 of 4")
        found = files.stage("prune-x-v1-00")
        assert found is not None
        assert (found.share, found.message, found.alive) == (1.0, "layer 3 of 4", True)
    assert files.stage("prune-x-v1-00") is None
    assert not [path for path in files.folder.rglob("*") if path.is_file()]


def test_a_stage_that_is_told_often_is_written_seldom(files: RunningFiles) -> None:
    with files.making("prune:small", "prune-x-v1-00") as tell:
        tell(0.1, "first")
        for step in range(1000):
            tell(0.2, f"step {step}")
        found = files.stage("prune-x-v1-00")
    assert found is not None
    assert found.message == "first"


def test_a_stage_that_failed_says_why_without_secrets(files: RunningFiles) -> None:
    with pytest.raises(RuntimeError), files.making("prune:small", "prune-x-v1-00"):
        raise RuntimeError("token hf_abcdefghijklmnopqrstuvwxyz0123456789 refused\nmore")
    found = files.stage("prune-x-v1-00")
    assert found is not None
    assert found.failed is not None
    assert found.failed.startswith("RuntimeError: token ")
    assert "hf_abcdef" not in found.failed
    assert "more" not in found.failed
    assert not found.alive


def test_a_stage_of_a_dead_process_is_not_being_made() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not RunningStage(name="a", key="b", process=child.pid).alive
    assert RunningStage(name="a", key="b", process=os.getpid()).alive
    assert RunningStage(name="a", key="b", host="elsewhere", process=child.pid).alive


def test_a_folder_that_cannot_be_written_costs_only_the_view(tmp_path: Path) -> None:
    (tmp_path / "running").write_text("in the way")
    files = RunningFiles(tmp_path)
    with files.following(run()), files.making("a", "b") as tell:
        tell(0.5, "half")
    assert files.runs() == []


def test_damaged_files_are_not_there(files: RunningFiles) -> None:
    with files.following(run()):
        for name in ("torn", "old"):
            (files.folder / "runs" / f"{name}.json").write_text('{"id": "torn"' if name == "torn" else "{}")
        assert [found.id for found in files.runs()] == ["one"]


def test_old_files_are_cleared_up_and_new_ones_are_not(files: RunningFiles) -> None:
    long_ago = time.time() - 30 * 24 * 3600
    for id_ in ("old", "new"):
        with files.following(run(id_)) as write:
            write(ended(run(id_), 0, None))
    with files.following(run("long")):
        for id_ in ("old", "long"):
            os.utime(files.folder / "runs" / f"{id_}.json", (long_ago, long_ago))
        with files.following(run("next")):
            assert {found.id for found in files.runs()} == {"new", "long", "next"}


def test_runs_since_a_moment_are_those_that_began_then(files: RunningFiles) -> None:
    now = datetime.now(UTC)
    for id_, began_at in (("before", now - timedelta(minutes=1)), ("after", now)):
        files_run = run(id_, began_at=began_at)
        with files.following(files_run):
            pass
    assert [found.id for found in files.runs(now)] == ["after"]
