"""A machine of its own for the tests: no test reads or writes the user's Prefect, MLflow, caches or artifact store."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Prefect, torch and datasets read the environment when they are imported, which is before any fixture.
_SCRATCH = Path(tempfile.mkdtemp(prefix="slimline-tests-"))
os.environ.update(
    {
        "PREFECT_HOME": str(_SCRATCH / "prefect"),
        "PREFECT_LOCAL_STORAGE_PATH": str(_SCRATCH / "prefect-results"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "HF_DATASETS_CACHE": str(_SCRATCH / "datasets"),
        # a package, of which a process has one
        "HF_MODULES_CACHE": str(_SCRATCH / "modules"),
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRANSFORMERS_VERBOSITY": "error",
    }
)
# two threads on two busy cores are slower than one for models this small, and one is the same on every machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [name for name in os.environ if name.startswith("SLIMLINE_")]:
    del os.environ[_name]


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def _home_of_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test that forgets to say where it lives gets an empty home."""
    if "SLIMLINE_HOME" not in os.environ:
        monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "nobody"))


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command line, called in this process, takes our log to the terminal; the next test may want to read it."""
    log = logging.getLogger("slimline")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A real Prefect server with an empty database, for flows in this process and in child processes; its API's URL."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def offline_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The offline default, shared by all homes; repositories are built when a test first asks for them."""
    from infra.offline_repository import INSTALL, WHEELS

    if any(importlib.util.find_spec(package) is None for package in WHEELS):
        pytest.skip(f"the offline default's wheels are not installed: {INSTALL}")
    return tmp_path_factory.mktemp("offline")
