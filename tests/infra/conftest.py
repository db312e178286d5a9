"""Sources over the offline default, built once for all tests that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.settings import Settings
from infra.sources.find import Sources, sources_from


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory, offline_root: Path) -> Sources:
    """The offline default of the session in a home of its own; what a test first asks for is built then."""
    home = tmp_path_factory.mktemp("home")
    (home / "offline").symlink_to(offline_root)
    return sources_from("offline", Settings(home=home))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with an empty home and no mirror, whatever the machine's environment says."""
    return Settings(home=tmp_path / "home", mirror=None)
