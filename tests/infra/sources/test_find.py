"""Finding repositories: order, identity, errors that show the way out, and a hub that answers or does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.errors import SourceMissing
from infra.settings import Settings
from infra.sources.find import Sources, TextData, fingerprint, sources_from
from tests.infra.fake_hub import COMMIT, fake_hub

CLOSED_PORT = "http://127.0.0.1:9"
PROJECT = Path(__file__).parents[3]


def put(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def python(code: str, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process: the hub's client reads its endpoint once, when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "SLIMLINE_HOME": str(home)}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)


def test_mirrors_are_searched_in_order(tmp_path: Path, settings: Settings) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    put(second / "owner/name", x="second")
    put(first / "other/name", x="first")
    sources = sources_from([str(first), str(second)], settings)
    assert sources.find("owner/name", "dataset").folder == second / "owner/name"
    put(first / "owner/name", x="first")
    found = sources_from([str(first), str(second)], settings).find("owner/name", "dataset")
    assert (found.folder, found.mirror) == (first / "owner/name", str(first))


def test_spec_wins_over_the_environment(tmp_path: Path) -> None:
    ours, theirs = put(tmp_path / "ours"), put(tmp_path / "theirs")
    settings = Settings(home=tmp_path, mirror=f"{theirs}{os.pathsep}offline")
    assert sources_from(str(ours), settings).mirrors == (ours,)
    assert sources_from(str(ours), settings).offline is None
    from_settings = sources_from(None, settings)
    assert from_settings.mirrors == (theirs,)
    assert from_settings.offline is not None
    assert not from_settings.hub


def test_without_any_mirror_only_the_hub_is_asked(settings: Settings) -> None:
    sources = sources_from(None, settings)
    assert (sources.mirrors, sources.offline, sources.hub) == ((), None, True)


def test_mirror_folder_that_does_not_exist(settings: Settings) -> None:
    with pytest.raises(SourceMissing, match="mirror folder /nowhere does not exist"):
        sources_from("/nowhere", settings)


def test_missing_names_where_it_looked_and_the_ways_out(tmp_path: Path, settings: Settings) -> None:
    mirror = str(put(tmp_path / "m"))
    ways = ["'nobody/nothing'", mirror, "(1) the hub", "(2) a mirror"]
    with pytest.raises(SourceMissing) as caught:
        sources_from(mirror, settings).find("nobody/nothing", "dataset")
    for part in (*ways, "(3) the offline default", "SLIMLINE_MIRROR=offline", "pip install"):
        assert part in str(caught.value)

    sources = sources_from([mirror, "offline"], settings)
    with pytest.raises(SourceMissing) as caught:
        sources.find("nobody/nothing", "dataset")
    for part in (*ways, "slimline/news"):
        assert part in str(caught.value)
    assert "(3)" not in str(caught.value), "the offline default is where it looked"
    with pytest.raises(SourceMissing, match=r"path \./nothing does not exist"):
        sources.find("./nothing", "model")


def test_local_path_is_known_by_its_content_alone(tmp_path: Path, settings: Settings) -> None:
    here, there = put(tmp_path / "here", a="text"), put(tmp_path / "deep/there", a="text")
    sources = Sources((), None, False, home=settings.home)
    identity = sources.find(str(here), "model").identity
    assert identity == sources.find(str(there), "model").identity == {"content": fingerprint(here)}
    assert str(tmp_path) not in json.dumps(identity)


def test_identity_of_a_mirror_holds_id_and_content(tmp_path: Path, settings: Settings) -> None:
    folder = put(tmp_path / "owner/name", a="text")
    identity = sources_from(str(tmp_path), settings).find("owner/name", "dataset").identity
    assert identity == {"repo_id": "owner/name", "content": fingerprint(folder)}
    put(folder, a="tex2")  # as long as before
    assert sources_from(str(tmp_path), settings).find("owner/name", "dataset").identity != identity


def test_fingerprint_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    one = put(tmp_path / "one", a="1", b="2")
    original = fingerprint(one)
    os.utime(one / "a", (1, 1))
    put(one, **{".hidden": "x"})
    assert fingerprint(one) == original
    (one / "b").rename(one / "c")
    assert fingerprint(one) != original


def test_text_data_refuses_unknown_fields() -> None:
    with pytest.raises(ValidationError, match="splitt"):
        TextData.model_validate({"dataset": "x", "splitt": "train"})


def test_silent_hub_fails_fast_with_the_ways_out(tmp_path: Path) -> None:
    code = (
        "from infra.settings import load_settings; from infra.sources.find import sources_from\n"
        "sources_from('hub', load_settings()).find('owner/name', 'model')"
    )
    begin = time.monotonic()
    done = python(code, tmp_path, CLOSED_PORT)
    assert time.monotonic() - begin < 10
    last = done.stderr.splitlines()[-1]
    assert "SourceMissing" in last
    assert "the hub did not answer" in last
    assert "SLIMLINE_MIRROR=offline" in last


def test_hub_gives_the_commit_and_knows_what_it_lacks(tmp_path: Path) -> None:
    code = (
        "from infra.settings import load_settings; from infra.sources.find import sources_from\n"
        "sources = sources_from('hub', load_settings())\n"
        "print(sources.find('owner/name', 'dataset').identity)\n"
        "sources.find('owner/other', 'dataset')"
    )
    with fake_hub("dataset", "owner/name", {"train.jsonl": b"{}\n"}) as endpoint:
        done = python(code, tmp_path, endpoint)
    assert done.stdout.strip() == str({"repo_id": "owner/name", "revision": COMMIT})
    assert "the hub knows no dataset 'owner/other'" in done.stderr.splitlines()[-1]


def test_cached_hub_repository_needs_no_network(tmp_path: Path) -> None:
    repo = tmp_path / "hf/hub/models--owner--name"
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    put(repo / "refs", main=COMMIT)
    code = "from infra.hub import resolve; print(resolve('owner/name', 'model', None))"
    assert python(code, tmp_path, CLOSED_PORT).stdout.strip() == COMMIT


@pytest.mark.parametrize("nothing", ["", " "])
def test_an_id_that_is_empty_is_not_the_current_folder(nothing: str, offline: Sources) -> None:
    for kind in ("model", "dataset"):
        with pytest.raises(SourceMissing, match=rf"the {kind} is '{nothing}'; give an id"):
            offline.find(nothing, kind)  # type: ignore[arg-type]
