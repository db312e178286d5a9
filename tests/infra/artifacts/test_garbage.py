"""Clearing the store takes what nobody needs, in one step each, and nothing that somebody holds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

import pytest

from infra.artifacts.claims import Claim, claimed, claims_frozen, live_claims
from infra.artifacts.garbage import Clearing, clear, survey
from infra.artifacts.inventory import stored
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import StoreInUse
from tests.infra.artifacts.test_inventory import ONE, TWO, write
from tests.infra.artifacts.test_store import HALF_WRITER
from tests.infra.processes import finish, kill_after_line, start

NOW = timedelta(0)
SCRATCH = ArtifactRef(kind="checkpoint", key="recover-lora-v1-0123456789abcdef")

CLAIMER = """
import sys, time
from pathlib import Path
from infra.artifacts.claims import claimed
from tests.infra.artifacts.test_inventory import ONE
with claimed(Path(sys.argv[1]), [ONE], "a run"):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "store")
    write(store, ONE)
    write(store, TWO)
    return store


def cleared(store: ArtifactStore, *wanted: ArtifactRef, older_than: timedelta = NOW, **more: Path) -> Clearing:
    return clear(store, lambda: wanted, older_than, **more)


def present(store: ArtifactStore) -> set[ArtifactRef]:
    return {each.ref for each in stored(store)}


def names(clearing: Clearing) -> set[str]:
    return {each.name for each in clearing.garbage}


def test_a_survey_changes_nothing(store: ArtifactStore) -> None:
    found = survey(store, lambda: [ONE], NOW)
    assert names(found) == {TWO.key}
    assert (found.bytes, found.num_kept, found.kept_bytes) == (7, 1, 7)
    assert present(store) == {ONE, TWO}


def test_what_is_not_wanted_goes_without_a_trace(
    store: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = tmp_path / "records"
    records.mkdir()
    (records / ONE.key).write_text("cached")
    (records / TWO.key).write_text("cached")
    assert names(cleared(store, ONE, records=records)) == {TWO.key}
    assert present(store) == {ONE}
    assert os.listdir(store.root / ".writing") == []
    assert [path for path in (store.root / ".locks").iterdir() if TWO.key in path.name] == []
    assert os.listdir(records) == [ONE.key]
    assert not store.has(TWO)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []  # it is not called lost
    write(store, TWO)
    assert store.verify(TWO) == []


def test_what_is_young_or_locked_stays(store: ArtifactStore) -> None:
    assert cleared(store, older_than=timedelta(hours=1)).garbage == ()
    with store.lock(ONE):
        assert names(cleared(store)) == {TWO.key}
    assert present(store) == {ONE}


def test_age_counts_from_when_it_came_here(store: ArtifactStore) -> None:
    folder = store.path(ONE)
    for path in (folder, *folder.iterdir()):
        os.utime(path, (0, 0))
    assert cleared(store, older_than=timedelta(hours=1)).garbage == ()  # its manifest is younger
    manifest = folder / "manifest.json"
    today = store.manifest(ONE).created_at.strftime("%Y-%m-%dT")
    manifest.write_text(manifest.read_text().replace(today, "2020-01-01T"))
    assert cleared(store, older_than=timedelta(hours=1)).garbage == ()  # its manifest was written here just now
    for path in (folder, *folder.iterdir()):
        os.utime(path, (0, 0))
    assert names(cleared(store, older_than=timedelta(hours=1))) == {ONE.key}


def test_scratch_of_what_must_still_be_made_stays(store: ArtifactStore) -> None:
    for ref in (ONE, SCRATCH):
        (store.scratch(ref) / "step").write_text("half")
    assert {(each.what, each.name) for each in cleared(store, ONE, TWO, SCRATCH).garbage} == {("scratch", ONE.key)}
    assert (store.scratch(SCRATCH) / "step").exists()
    assert names(cleared(store, ONE, TWO)) == {SCRATCH.key}
    assert os.listdir(store.root / ".scratch") == []


def test_broken_artifacts_dead_workspaces_and_old_locks_go(store: ArtifactStore) -> None:
    (store.path(ONE) / "manifest.json").write_text("{")
    dead = Path(kill_after_line(start(HALF_WRITER, store.root))).parent
    with store.lock(SCRATCH):
        pass
    other = store.root / ".locks" / "of-something-else.lock"
    other.write_text("")
    found = cleared(store)
    assert {ONE.key, TWO.key, dead.name, f"{SCRATCH.key}.lock"} <= names(found)
    assert present(store) == set()
    assert not dead.exists()
    assert os.listdir(store.root / ".locks") == [other.name]


def test_a_claim_keeps_what_it_names_as_long_as_its_process_lives(store: ArtifactStore) -> None:
    claimer = start(CLAIMER, store.root)
    assert claimer.stdout is not None
    assert claimer.stdout.readline() == "claimed\n"
    try:
        assert names(cleared(store)) == {TWO.key}
        assert [claim.holder for claim in live_claims(store.root)] == ["a run"]
    finally:
        claimer.kill()
        claimer.communicate()
    assert names(cleared(store)) == {ONE.key}
    assert os.listdir(store.root / ".claims") == [".settled"]


def test_a_claim_waits_for_a_clearing(store: ArtifactStore) -> None:
    with claims_frozen(store.root):
        claimer = start(CLAIMER, store.root)
        time.sleep(1.0)
        assert live_claims(store.root) == ()
        assert claimer.poll() is None
    assert claimer.stdout is not None
    assert claimer.stdout.readline() == "claimed\n"
    assert [claim.refs for claim in live_claims(store.root)] == [(ONE,)]
    claimer.kill()
    claimer.communicate()


def test_a_claim_that_cannot_be_read_stops_everything(store: ArtifactStore) -> None:
    with claimed(store.root, [ONE], "a run"):
        (path,) = (store.root / ".claims").glob("*.json")
        assert Claim.model_validate_json(path.read_bytes()).refs == (ONE,)
        path.write_text("{")
        with pytest.raises(StoreInUse, match="claim"):
            cleared(store)
    assert present(store) == {ONE, TWO}


def test_a_run_that_ends_while_wanted_is_asked_is_seen(store: ArtifactStore) -> None:
    """Claims are read before results: a run that gives up its claim in between has been recorded already."""
    recorded: list[ArtifactRef] = []
    holder = claimed(store.root, [ONE], "a run")
    holder.__enter__()

    def wanted() -> Collection[ArtifactRef]:
        recorded.append(ONE)
        holder.__exit__(None, None, None)
        return []

    assert names(clear(store, wanted, NOW)) == {TWO.key}
    assert recorded == [ONE]


DYING_COLLECTOR = """
import os, sys
from datetime import timedelta
from pathlib import Path
from infra.artifacts.store import ArtifactStore
from infra.artifacts.garbage import clear
left, rename = int(sys.argv[2]), Path.rename
def dying(self, target):
    global left
    if left == 0:
        os.kill(os.getpid(), 9)
    left -= 1
    return rename(self, target)
Path.rename = dying
clear(ArtifactStore(Path(sys.argv[1])), lambda: [], timedelta(0))
"""


@pytest.mark.parametrize("renames, left", [(0, {ONE, TWO}), (1, {TWO})])
def test_killed_in_the_middle_leaves_each_whole_or_gone(
    store: ArtifactStore, renames: int, left: set[ArtifactRef], caplog: pytest.LogCaptureFixture
) -> None:
    child = start(DYING_COLLECTOR, store.root, renames)
    child.communicate(timeout=60)
    assert child.returncode == -9
    assert present(store) == left
    assert [store.verify(ref) for ref in left] == [[]] * len(left)
    assert store.has(ONE) == (ONE in left)
    assert caplog.records == []
    store.preflight()
    assert os.listdir(store.root / ".writing") == []
    assert {each.ref for each in cleared(store).garbage if each.ref} == left


WRITER = """
import sys
from pathlib import Path
from infra.artifacts.store import ArtifactStore
from infra.artifacts.claims import claimed
from infra.artifacts.store import ArtifactRef
store = ArtifactStore(Path(sys.argv[1]))
refs = [ArtifactRef(kind="report", key=f"evaluate-x-v1-{number:016x}") for number in range(5)]
lost = 0
for _ in range(60):
    with claimed(store.root, refs, "a run"):
        for ref in refs:
            with store.lock(ref):
                if not store.has(ref):
                    with store.writing(ref, request={}, versions={}) as folder:
                        (folder / "report.json").write_text("{}")
        lost += sum(not store.has(ref) for ref in refs)
print("lost", lost, flush=True)
"""


def test_two_processes_write_while_a_third_clears_all_the_time(store: ArtifactStore) -> None:
    writers = [start(WRITER, store.root) for _ in range(2)]
    rounds = removed = 0
    while any(writer.poll() is None for writer in writers):
        removed += len(cleared(store).garbage)
        rounds += 1
        time.sleep(0.005)
    assert [finish(writer) for writer in writers] == ["lost 0", "lost 0"]
    assert rounds > 5
    assert removed > 5
    cleared(store)
    assert present(store) == set()
    assert os.listdir(store.root / ".writing") == os.listdir(store.root / ".locks") == []
