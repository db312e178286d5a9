"""`slimline watch` on real files and a real store: what it tells, where, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.errors import SpecError
from flows.watch.find import find_followed
from flows.watch.forecast import Timings, recorded_timings
from flows.watch.screen import follow
from flows.watch.state import RunState, Watcher
from flows.watch.words import changes, duration, end, overview
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.results.rows import NightRow, RunRow, StageRow
from infra.results.store import ResultsStore
from infra.running.files import FollowedRun, RunningFiles, StageOfRun, ended
from tests.command_line import PROJECT

NAMES = ("import-model", "prune:ä/b <script>", "evaluate:perplexity:x")
KEYS = ("import-model-v1-00", "prune-slimgpt-v3-00", "evaluate-perplexity-v2-00")
KINDS = ("checkpoint", "checkpoint", "report")


@dataclass
class Scene:
    """A home in which a run of three stages runs in this process."""

    home: Path
    timings: Timings = field(default_factory=lambda: Timings(()))

    @property
    def files(self) -> RunningFiles:
        return RunningFiles(self.home)

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.home / "store")

    @property
    def results(self) -> ResultsStore:
        return ResultsStore(self.home / "results.duckdb")

    @property
    def watcher(self) -> Watcher:
        return Watcher(self.files, self.store, self.timings)

    def make(self, place: int) -> None:
        ref = ArtifactRef.model_validate({"kind": KINDS[place], "key": KEYS[place]})
        with self.store.writing(ref, request={}, versions={}) as folder:
            (folder / "content").write_text("made")

    def lines(self, before: RunState | None = None) -> list[str]:
        return list(changes(before, self.watcher.look(one())))


def one(id_: str = "one", **fields: object) -> FollowedRun:
    stages = tuple(
        StageOfRun(name=name, key=key, kind=kind) for name, key, kind in zip(NAMES, KEYS, KINDS, strict=True)
    )
    known = {
        "id": id_,
        "kind": "run",
        "key": f"run-{id_}",
        "name": "Läufe/a b",
        "model": "owner/model",
        "stages": stages,
    }
    return FollowedRun.model_validate(known | fields)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def statuses(state: RunState) -> list[str]:
    return [stage.status for stage in state.stages]


def test_each_stage_is_found_in_its_state(scene: Scene) -> None:
    scene.make(0)
    with scene.files.following(one()):
        before = scene.watcher.look(one())
        assert statuses(before) == ["cached", "waiting", "waiting"]
        with scene.files.making(NAMES[1], KEYS[1]) as tell:
            tell(0.5, "layer 2 of 4")
            now = scene.watcher.look(before.run)
            assert statuses(now) == ["cached", "running", "waiting"]
            assert list(changes(before, now)) == [
                "prune:ä/b <script>: running for 0 s, 50 %, layer 2 of 4, about 0 s left"
            ]
            scene.make(1)
        with pytest.raises(ValueError, match="no"), scene.files.making(NAMES[2], KEYS[2]):
            raise ValueError("no")
        last = scene.watcher.look(before.run)
        assert statuses(last) == ["cached", "done", "failed"]
        assert "evaluate:perplexity:x: failed: ValueError: no" in list(changes(now, last))


def test_what_is_refreshed_waits_although_it_is_in_the_store(scene: Scene) -> None:
    scene.make(0)
    stages = [stage.model_copy(update={"refreshed": True}) for stage in one().stages]
    with scene.files.following(one(stages=stages)):
        assert statuses(scene.watcher.look(one()))[0] == "waiting"
        with scene.store.writing(
            ArtifactRef.model_validate({"kind": KINDS[0], "key": KEYS[0]}), request={}, versions={}, replace=True
        ) as folder:
            (folder / "content").write_text("made")
        assert statuses(scene.watcher.look(one()))[0] == "done"


def test_the_end_is_estimated_from_what_was_timed_before(scene: Scene) -> None:
    scene.timings = Timings([("prune-slimgpt-v2-9", "owner/model", 100.0), ("prune-slimgpt-v2-8", "other", 5000.0)])
    with scene.files.following(one()):
        state = scene.watcher.look(one())
        assert state.left == 100.0
        assert state.uncounted == 2
        assert "about 1 min 40 s left, until " in overview(state)
        assert "2 stages not counted that were never timed" in overview(state)


def test_a_share_tells_more_than_earlier_times(scene: Scene) -> None:
    scene.timings = Timings([(key, "owner/model", 1000.0) for key in KEYS])
    run = one()
    with scene.files.following(run), scene.files.making(NAMES[0], KEYS[0]) as tell:
        tell(0.5, "half")
        state = scene.watcher.look(run)
    (running,) = state.running
    assert running.left is not None
    assert running.left < 5.0
    assert state.left is not None
    assert 2000 <= state.left < 2010


def test_nobody_knows_without_earlier_times(scene: Scene) -> None:
    with scene.files.following(one()):
        assert scene.watcher.look(one()).left is None
        assert "no estimate yet" in overview(scene.watcher.look(one()))


def test_when_all_stages_have_ended_it_is_recorded(scene: Scene) -> None:
    for place in range(3):
        scene.make(place)
    with scene.files.following(one()):
        assert (
            overview(scene.watcher.look(one()))
            == "3 stages: 3 found in the store; every stage has ended, now it is recorded"
        )


def test_timings_are_read_from_the_results_store(scene: Scene) -> None:
    assert recorded_timings(scene.results).expected(KEYS[1], "owner/model") is None
    run = RunRow(
        run_key="run-1", name="a", spec=json.dumps({"model": {"id": "owner/model"}}), status="completed",
        started_at=datetime.now(UTC), finished_at=datetime.now(UTC), slimline_version="0",
    )  # fmt: skip
    rows = [
        StageRow(run_key="run-1", name=f"prune:{n}", stage_key=f"prune-slimgpt-v1-{n}", kind="checkpoint",
                 status="completed", seconds=seconds)
        for n, seconds in enumerate((10.0, 30.0, 20.0))
    ]  # fmt: skip
    scene.results.record(run, rows)
    timings = recorded_timings(scene.results)
    assert timings.expected(KEYS[1], "owner/model") == 20.0
    assert timings.expected("prune-slimgpt-v1-1", "owner/model") == 30.0
    assert timings.expected(KEYS[1], "unknown") == 20.0
    assert timings.expected(KEYS[2], "owner/model") is None


def test_the_newest_that_runs_is_meant_and_a_night_rather_than_its_cells(scene: Scene) -> None:
    with pytest.raises(SpecError, match=r"nothing is running in .*; start one in another terminal: slimline run demo"):
        find_followed(scene.files, scene.results, None)
    early = datetime.now(UTC) - timedelta(hours=1)
    night = one("night", kind="night", key="night-1", name="small", stages=(), cells={"a": "small-a"}, began_at=early)
    with scene.files.following(night), scene.files.following(one("cell", part_of="night", name="small-a")):
        for name in (None, "small", "night-1"):
            assert find_followed(scene.files, scene.results, name) == night
        cell = find_followed(scene.files, scene.results, "small-a")
        assert isinstance(cell, FollowedRun)
        assert cell.id == "cell"
        with scene.files.following(one()):
            newest = find_followed(scene.files, scene.results, None)
            assert isinstance(newest, FollowedRun)
            assert newest.id == "one"
    with pytest.raises(SpecError, match=r"no run or night 'smal'; did you mean 'small'\?"):
        find_followed(scene.files, scene.results, "smal")


def test_one_that_runs_is_meant_rather_than_a_newer_one_that_ended(scene: Scene) -> None:
    with scene.files.following(one("first")):
        with scene.files.following(one("second")) as write:
            write(ended(one("second"), 0, None))
        found = find_followed(scene.files, scene.results, "Läufe/a b")
        assert isinstance(found, FollowedRun)
        assert found.id == "first"


def test_a_night_is_followed_cell_by_cell(scene: Scene) -> None:
    night = one(
        "night", kind="night", key="night-1", name="small", stages=(), cells={"a": "s-a", "b": "s-b", "c": "s-c"}
    )
    with scene.files.following(night):
        assert overview(scene.watcher.look(night)).startswith("0 of 3 cells ended; no stage has begun; no estimate yet")
        with scene.files.following(one("a", name="s-a", part_of="night")) as write:
            first = scene.watcher.look(night)
            write(ended(one("a", name="s-a", part_of="night"), 0, None))
        with (
            scene.files.following(one("b", name="s-b", part_of="night")),
            scene.files.making(NAMES[0], KEYS[0]),
        ):
            state = scene.watcher.look(night)
            assert [line for line in changes(first, state) if line.startswith("cell")] == [
                "cell a: completed after 0 s"
            ]
            assert overview(state).startswith("1 of 3 cells ended; 3 stages: 1 running, 2 waiting")
            assert state.not_begun == 1


def test_stages_that_cells_share_count_once(scene: Scene) -> None:
    night = one("night", kind="night", name="small", stages=(), cells={"a": "s-a", "b": "s-b"})
    with (
        scene.files.following(night),
        scene.files.following(one("a", name="s-a", part_of="night")),
        scene.files.following(one("b", name="s-b", part_of="night")),
    ):
        assert len(scene.watcher.look(night).stages) == 3


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3599.9, "1 h 00 min"), (7500, "2 h 05 min")]
)
def test_durations_are_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_a_line_tells_each_change(scene: Scene) -> None:
    said: list[str] = []
    run = one()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 1:
            scene.make(0)
            write(ended(run, 2, "prune: raise\ndampening_frac"))

    with scene.files.following(run) as write:
        assert follow(scene.watcher, run, say) == 2
    assert re.match(r"\d\d:\d\d:\d\d Läufe/a b \(run-one\): 3 stages: 3 waiting; no estimate yet", said[0])
    assert any(line.endswith("import-model: done in 0 s") for line in said), said
    assert re.fullmatch(
        r"Läufe/a b \(run-one\): ended with exit code 2 after \d+ s: prune: raise dampening_frac", said[-1]
    )


def test_a_killed_run_is_said_to_be_killed(scene: Scene) -> None:
    with scene.files.following(one()):
        pass
    said: list[str] = []
    assert follow(scene.watcher, one(), said.append) == 1
    assert said[-1].endswith("ended without a word, it was killed; the same command goes on from there")
    assert end(scene.watcher.look(one())).startswith("ended without a word")
    assert statuses(scene.watcher.look(one())) == ["waiting"] * 3


def test_a_recorded_run_of_which_no_file_is_left_is_found(scene: Scene) -> None:
    moments = {"started_at": datetime.now(UTC), "finished_at": datetime.now(UTC)}
    counts = dict.fromkeys(("num_stages", "num_run", "num_cached", "num_failed"), 0)
    known = {"night_id": "night-old-1", "name": "old", "spec": "{}", "status": "completed", "gates_passed": False}
    scene.results.record_night(NightRow.model_validate(known | moments | counts | {"slimline_version": "0"}))
    child = watching(scene.home, "old")
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 3
    assert output.startswith("old is not running; it ended at ")
    assert output.endswith("completed, but a gate does not hold\n")


def watching(home: Path, *arguments: str, **streams: int) -> subprocess.Popen[str]:
    """`slimline watch` as a child; without streams its output is piped."""
    variables = {**os.environ, "SLIMLINE_HOME": str(home), "PYTHONUNBUFFERED": "1", "COLUMNS": "100", "LINES": "30"}
    command = [sys.executable, "-m", "flows", "watch", *arguments]
    streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, cwd=PROJECT, env=variables, text=True, preexec_fn=_as_in_a_terminal, **streams
    )


def _as_in_a_terminal() -> None:
    """What a shell runs in the background, these tests perhaps, ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Terminal:
    """A pseudo-terminal in which `slimline watch` runs."""

    child: subprocess.Popen[str]
    master: int
    seen: str = ""

    def wait_for(self, words: str, patience: float = 120.0) -> None:
        deadline = time.monotonic() + patience
        while words not in self.seen:
            assert time.monotonic() < deadline, f"{words!r} was not shown: {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    assert words in self.seen, f"{words!r} was not shown: {self.seen!r}"


@contextmanager
def terminal(scene: Scene, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Iterator[Terminal]:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | variables).items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    child = watching(scene.home, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        yield Terminal(child, master)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        os.close(master)


def test_a_terminal_gets_a_table_and_the_exit_code(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.make(0)
    with scene.files.following(one()) as write, terminal(scene, monkeypatch) as shown:
        with scene.files.making(NAMES[1], KEYS[1]) as tell:
            tell(0.5, "layer 2 of 4")
            shown.wait_for("layer 2 of 4")
            shown.wait_for("found in the store")
        write(ended(one(), 3, "gate"))
        shown.wait_for("ended with exit code 3")
        assert shown.child.wait(60) == 3
    assert "\x1b[1;36m" in shown.seen, "what runs is bold and has a colour"
    assert "prune:ä/b <script>" in shown.seen


def test_no_color_takes_the_colours_and_leaves_the_table(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with scene.files.following(one()) as write, terminal(scene, monkeypatch, NO_COLOR="1") as shown:
        with scene.files.making(NAMES[1], KEYS[1]):
            shown.wait_for("running for")
        write(ended(one(), 0, None))
        shown.wait_for("completed after")
    assert "\x1b[1;36m" not in shown.seen
    assert "\x1b[32m" not in shown.seen


def test_a_dumb_terminal_gets_lines_and_ctrl_c_leaves_the_run_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene.files.following(one()), terminal(scene, monkeypatch, TERM="dumb") as shown:
        shown.wait_for("3 stages: 3 waiting")
        shown.child.send_signal(signal.SIGINT)
        shown.wait_for("not watching any longer; what ran still runs")
        assert shown.child.wait(60) == 130
        assert "\x1b" not in shown.seen
        assert "Traceback" not in shown.seen
        (run,) = scene.files.runs()
        assert scene.files.is_alive(run)
