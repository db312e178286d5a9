"""A machine of its own for the tests: no test reads or writes the user's Prefect, MLflow, caches or artifact store.

Homes for flows: one smoke run is shared by every test that only looks at it or starts from a copy of it.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flows.run.outcome import RunResult
    from tests.flows.home import Home

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs a Prefect server. Workers begin with the files that take longest: none of them comes last.

    One of these makes the smoke run, and the others that want it come when it is there: nobody waits.
    """
    longest: dict[Path, int] = {}
    smoke_files: list[Path] = []
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "prefect_server" in names:
            item.add_marker("server")
        if "smoke" in names:
            smoke_files.append(item.path)
        marked = [item.get_closest_marker(name) is not None for name in ("server", "slow")]
        weight = 2 * marked[0] + marked[1]
        longest[item.path] = max(weight, longest.get(item.path, 0))
    if hasattr(config, "workerinput"):
        turns = dict.fromkeys(smoke_files, 2) | dict.fromkeys(smoke_files[:1], 0)
        items.sort(key=lambda item: (-longest[item.path], turns.get(item.path, 1)))


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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of all workers of this test run, for what takes long to make and is only read."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def prefect_server(shared_folder: Path) -> Iterator[str]:
    """A real Prefect server, for flows in this process and in child processes; its API's URL. Its database was empty
    when the first test began: all workers share it, so a test asks for what is its own."""
    from tests.one_server import shared_server

    with shared_server(shared_folder) as api_url:
        yield api_url


@pytest.fixture
def prefect_home(shared_folder: Path, prefect_server: str, tmp_path: Path) -> Path:
    """PREFECT_HOME for a server of a test's own, with a database in which nothing is recorded: Prefect takes as long to
    make one as for the rest of its start."""
    from tests.one_server import BLANK

    folder = tmp_path / "prefect"
    folder.mkdir()
    shutil.copyfile(shared_folder / BLANK, folder / "prefect.db")
    return folder


@pytest.fixture(scope="session")
def offline_root(shared_folder: Path) -> Path:
    """The offline default, shared by all homes; repositories are built when a test first asks for them."""
    from infra.offline.repository import INSTALL, WHEELS

    if any(importlib.util.find_spec(package) is None for package in WHEELS):
        pytest.skip(f"the offline default's wheels are not installed: {INSTALL}")
    root = shared_folder / "offline"
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def blank_mlflow(shared_folder: Path) -> Path:
    """An MLflow database in which nothing is recorded: making one takes five seconds."""
    from mlflow import MlflowClient

    from infra.filesystem.locks import flocked

    path = shared_folder / "mlflow.db"
    with flocked(path.with_suffix(".lock")):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
            unfinished.rename(path)
    return path


@pytest.fixture
def home(tmp_path: Path, offline_root: Path, prefect_server: str, blank_mlflow: Path) -> Home:
    """An empty home."""
    from tests.flows.home import Home

    return Home.create(tmp_path / "home", offline_root, prefect_server, blank_mlflow)


@pytest.fixture(scope="session")
def smoke(shared_folder: Path, offline_root: Path, prefect_server: str, blank_mlflow: Path) -> tuple[Home, RunResult]:
    """A home in which the smoke spec, all of it, has been run once, by the worker that asked for it first. To be looked
    at only: `copy` it to change it."""
    from flows.run.outcome import RunResult
    from infra.filesystem.locks import flocked
    from tests.flows.home import Home

    folder = shared_folder / "smoke"
    folder.mkdir(exist_ok=True)
    said = folder / "result.json"
    with flocked(folder / "lock"):
        if said.exists():
            home = Home(folder / "home", prefect_server)
        else:
            shutil.rmtree(folder / "home", ignore_errors=True)  # of a worker in which it failed
            home = Home.create(folder / "home", offline_root, prefect_server, blank_mlflow)
            said.write_text(home.run("smoke").model_dump_json())
    return home, RunResult.model_validate_json(said.read_text())


@pytest.fixture
def smoke_copy(smoke: tuple[Home, RunResult], tmp_path: Path) -> Home:
    """A copy of that home, to be changed."""
    return smoke[0].copy(tmp_path / "home")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are spawned with `multiprocessing` are forked from one that has imported torch and transformers,
    which takes each of them seconds: where what becomes of a process is the point, and not its start."""
    server, context = multiprocessing.get_context("forkserver"), multiprocessing.get_context
    server.set_forkserver_preload(["evaluation.inference.replicas", "tasks.stages.walk_processes", "tests.tiny"])
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda method=None: server if method == "spawn" else context(method)
    )


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages whose artifacts were really made in this process while the test ran."""
    from tasks.execution import stage

    names: list[str] = []
    make = stage._make

    def noted(request: object, stage_name: str, *rest: object) -> float:
        names.append(stage_name)
        return make(request, stage_name, *rest)

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
