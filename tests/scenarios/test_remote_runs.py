"""Two homes and one object store: what one has made the other does not make again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from infra.artifacts.store import ArtifactRef
from infra.errors import RemoteUnusable
from tests.flows.home import Home

QUICK = ("profile=null",)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def empty(tmp_path: Path, offline_root: Path, prefect_server: str, blank_mlflow: Path) -> Callable[[str], Home]:
    return lambda name: Home.create(tmp_path / name, offline_root, prefect_server, blank_mlflow)


def sharing(home: Home, bucket: Path) -> Home:
    return replace(home, variables={"SLIMLINE_REMOTE": f"file://{bucket}"})


def test_a_second_home_computes_nothing(
    smoke_copy: Home,
    empty: Callable[[str], Home],
    bucket: Path,
    filled: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also of a run that was made before there was an object store: what is found is shared."""
    first = sharing(smoke_copy, bucket).run("smoke", QUICK)
    second = sharing(empty("second"), bucket)
    result = second.run("smoke", QUICK)
    assert filled == []
    assert {stage.status for stage in result.stages} == {"cached"}
    assert [row.value for row in result.metrics] == [row.value for row in first.metrics]
    for stage in result.stages:
        ref = ArtifactRef(kind=stage.kind, key=stage.key)
        assert second.store.manifest(ref) == smoke_copy.store.manifest(ref)

    # what is lost there is made again here, and shared again
    report = min(bucket.glob("report/*/*/report.json"))
    shutil.rmtree(report.parent)
    third = sharing(empty("third"), bucket)
    with caplog.at_level(logging.WARNING):
        third.run("smoke", QUICK)
    assert len(filled) == 1
    assert "could not be fetched" in caplog.text
    assert not report.exists()


def test_an_object_store_that_cannot_be_written_is_refused_before_any_work(
    empty: Callable[[str], Home], bucket: Path, filled: list[str]
) -> None:
    bucket.write_text("a file")
    with pytest.raises(RemoteUnusable, match="SLIMLINE_REMOTE"):
        sharing(empty("home"), bucket).run("smoke", QUICK)
    assert filled == []
