"""What is in the store, and what of it is broken or has no business there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.artifacts.inventory import Finding, broken, litter, store_bytes, stored
from infra.artifacts.store import MANIFEST, ArtifactRef, ArtifactStore
from tests.infra.artifacts.test_store import HALF_WRITER
from tests.infra.processes import kill_after_line, start

ONE = ArtifactRef(kind="checkpoint", key="prune-slimgpt-v1-0123456789abcdef")
TWO = ArtifactRef(kind="report", key="evaluate-perplexity-v1-0123456789abcdef")


def write(store: ArtifactStore, ref: ArtifactRef, content: bytes = b"weights") -> Path:
    with store.writing(ref, request={}, versions={}) as folder:
        (folder / "model.safetensors").write_bytes(content)
    return store.path(ref)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "store")
    write(store, ONE, b"x" * 1000)
    write(store, TWO, b"y" * 10)
    return store


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def shorten(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x")


def delete(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def add_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def findings(store: ArtifactStore) -> list[Finding]:
    return list(broken(store, [each.ref for each in stored(store)]))


def test_the_inventory_has_every_artifact_with_its_size(store: ArtifactStore) -> None:
    assert [(each.ref, each.bytes, each.problem) for each in stored(store)] == [(ONE, 1000, ""), (TWO, 10, "")]
    assert store_bytes(store) == 1010
    (store.scratch(ONE) / "layer").write_bytes(b"z" * 100)
    (store.scratch(ONE) / "linked").hardlink_to(store.scratch(ONE) / "layer")
    assert store_bytes(store) == 1110
    assert findings(store) == []
    assert list(litter(store)) != []  # scratch of a stage that is done
    store.drop_scratch(ONE)
    assert list(litter(store)) == []


def test_an_empty_store_has_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "nowhere")
    assert list(stored(store)) == list(litter(store)) == []
    assert store_bytes(store) == 0


@pytest.mark.parametrize("damage", [flip, shorten, delete, break_manifest, add_file], ids=lambda case: case.__name__)
def test_damage_is_found_and_only_where_it_is(store: ArtifactStore, damage: Callable[[Path], None]) -> None:
    folder = store.path(ONE)
    damage(folder)
    sizes: list[int] = []
    (found,) = list(broken(store, [each.ref for each in stored(store)], sizes.append))
    assert (found.ref, found.path) == (ONE, folder)
    assert "\n" not in found.problem
    assert [path.name for path in found.foreign] == (["notes.txt"] if damage is add_file else [])
    assert 10 in sizes


def test_litter_is_named(store: ArtifactStore) -> None:
    (store.root / "backup").mkdir()
    (store.root / "report" / "Copy of it").mkdir()
    (store.root / "report" / "a-file").write_text("")
    dead = Path(kill_after_line(start(HALF_WRITER, store.root)))
    found = {finding.path.name: finding.problem for finding in litter(store)}
    assert set(found) == {"backup", "Copy of it", "a-file", dead.parent.name}
    assert "died" in found[dead.parent.name]
    assert dead.exists()  # looking changes nothing


def test_work_in_progress_is_no_litter(store: ArtifactStore) -> None:
    living = start(HALF_WRITER, store.root)
    assert living.stdout is not None
    living.stdout.readline()
    try:
        assert list(litter(store)) == []
    finally:
        living.kill()
        living.communicate()
