"""Sources over the offline default, built once for all tests that read it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from infra.offline_repository import INSTALL, WHEELS
from infra.settings import Settings
from infra.sources import Sources, sources_from


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The offline default in a home of its own; repositories are built when a test first asks for them."""
    if any(importlib.util.find_spec(package) is None for package in WHEELS):
        pytest.skip(f"the offline default's wheels are not installed: {INSTALL}")
    return sources_from("offline", Settings(home=tmp_path_factory.mktemp("home")))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with an empty home and no mirror, whatever the machine's environment says."""
    return Settings(home=tmp_path / "home", mirror=None)
