"""What counts the faults, and (with the long tests) a fault on the tiny night and the judge of them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from infra.artifacts.store import MANIFEST
from tests.chaos.__main__ import Flat, disturb, figures, stage, table
from tests.chaos.faults import FAULTS
from tests.chaos.scene import Scene, Survival, finished, judged

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, offline_root: Path, prefect_server: str, blank_mlflow: Path
) -> Scene:
    staged = stage(tmp_path_factory.mktemp("chaos"), offline_root, prefect_server, blank_mlflow)
    return replace(staged, in_process=True)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["kill"])
def test_a_night_survives(fault: str, scene: Scene) -> None:
    told: list[Flat] = []
    flat = disturb(scene, {fault: 1}, 1, told.append)
    assert flat == told[-1]
    assert flat == {
        **{"tried": 1, "survived": 1, "stages_repeated": 0, "rows_lost": 0},
        **{f"{fault}_tried": 1, f"{fault}_survived": 1, f"{fault}_stages_repeated": 0, f"{fault}_rows_lost": 0},
    }


@pytest.mark.long
def test_what_did_not_survive_is_found_out(scene: Scene) -> None:
    """The judge of all faults: a changed file, a file too many, a lost run and a stage run again are not overlooked."""
    home = scene.finished_home("tampered")
    assert judged(scene, home, "none", [], set()).survived
    ref = min(finished(home), key=lambda ref: ref.key)
    file = next(path for path in sorted((home.store.root / ref.kind / ref.key).iterdir()) if path.name != MANIFEST)
    file.write_bytes(file.read_bytes()[::-1] + b"!")
    (home.store.root / "report" / "half-made").mkdir()
    next(home.settings.results_path.with_suffix("").glob("runs/*.parquet")).unlink()
    found = judged(scene, home, "all of that", [ref.key], {ref.key})
    assert (found.survived, found.stages_repeated) == (False, 1)
    assert found.rows_lost > 1
    assert any("half-made has no manifest" in problem for problem in found.problems)
    assert any(ref.key in problem for problem in found.problems)


def test_what_did_not_survive_is_counted() -> None:
    good = Survival("a", ())
    bad = [Survival("b", ("it broke",)), Survival("b", (), stages_repeated=2), Survival("b", (), rows_lost=3)]
    flat = figures([("kill", good), *(("full_disk", one) for one in bad)], {"clock_jump": "no library"})
    assert (flat["tried"], flat["survived"], flat["stages_repeated"], flat["rows_lost"]) == (4, 1, 2, 3)
    assert flat["kill_survived"] == 1
    assert "| full_disk | 0 / 3 | 2 | 3 |" in table(flat)
    assert "| clock_jump | not tried: no library |" in table(flat)


def test_every_fault_says_what_it_is() -> None:
    assert all(fault.__doc__ for fault in FAULTS.values())
