"""Homes for flows. One smoke run is shared by every test that only looks at it or starts from a copy of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.outcome import RunResult
from tests.flows.home import Home


@pytest.fixture(scope="session")
def blank_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database in which nothing is recorded: making one takes five seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def home(tmp_path: Path, offline_root: Path, prefect_server: str, blank_mlflow: Path) -> Home:
    """An empty home."""
    return Home.create(tmp_path / "home", offline_root, prefect_server, blank_mlflow)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, offline_root: Path, prefect_server: str) -> tuple[Home, RunResult]:
    """A home in which the smoke spec, all of it, has been run once. To be looked at only: `copy` it to change it."""
    home = Home.create(tmp_path_factory.mktemp("smoke") / "home", offline_root, prefect_server)
    return home, home.run("smoke")


@pytest.fixture
def smoke_copy(smoke: tuple[Home, RunResult], tmp_path: Path) -> Home:
    """A copy of that home, to be changed."""
    return smoke[0].copy(tmp_path / "home")


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages whose artifacts were really made in this process while the test ran."""
    from tasks import stage

    names: list[str] = []
    make = stage._make

    def noted(request: object, stage_name: str, *rest: object) -> None:
        names.append(stage_name)
        make(request, stage_name, *rest)

    monkeypatch.setattr(stage, "_make", noted)
    return names


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of six MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
