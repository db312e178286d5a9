"""A home (SLIMLINE_HOME) for tests: flows run in it in this process or, as a user would, in a child process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flows.night.outcome import NightResult
from flows.run.outcome import RunResult
from flows.spec.load import load_spec
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.results.store import ResultsStore
from infra.settings import Settings
from tests.command_line import PROJECT, call


@dataclass(frozen=True)
class Home:
    """One SLIMLINE_HOME, its Prefect cache beside it, and the server that its flows report to."""

    folder: Path
    api_url: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, offline_root: Path, api_url: str = "", blank_mlflow: Path | None = None) -> Home:
        """An empty home that borrows the offline default of the session, and perhaps a database with empty tables."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "offline").symlink_to(offline_root)
        if blank_mlflow is not None:
            shutil.copyfile(blank_mlflow, folder / "mlflow.db")
        return cls(folder, api_url)

    def copy(self, folder: Path) -> Home:
        """A second home with the same artifacts, Prefect records and results."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Home(folder, self.api_url)

    @property
    def settings(self) -> Settings:
        return Settings(home=self.folder)

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.settings.store_root)

    @property
    def results(self) -> ResultsStore:
        return ResultsStore.of(self.settings)

    def delete(self, ref: ArtifactRef) -> None:
        shutil.rmtree(self.store.path(ref))

    @contextmanager
    def lived_in(self) -> Iterator[None]:
        """This process works in this home."""
        from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

        before = dict(os.environ)
        os.environ |= {"SLIMLINE_HOME": str(self.folder)} | self.variables
        try:
            with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: self.folder / "prefect-results"}):
                yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def run(self, spec: str, overrides: Sequence[str] = (), refresh: tuple[str, ...] = ()) -> RunResult:
        """Call the flow in this process."""
        from flows.run.compress import compress

        with self.lived_in():
            return compress(load_spec(spec, overrides), refresh)

    def night(self, spec: str, overrides: Sequence[str] = (), refresh: Sequence[str] = ()) -> NightResult:
        """Run a night in this process."""
        from flows.night.nightly import nightly

        with self.lived_in():
            return nightly(spec, list(overrides), list(refresh))

    @property
    def environment(self) -> dict[str, str]:
        """Of a child process; with an `api_url` it need not start a Prefect server of its own."""
        own = {"SLIMLINE_HOME": str(self.folder), "PREFECT_LOCAL_STORAGE_PATH": str(self.folder / "prefect-results")}
        server = {"PREFECT_API_URL": self.api_url} if self.api_url else {}
        return dict(os.environ) | own | server | self.variables

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line in a process of its own; its output can be read line by line."""
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *arguments],
            cwd=PROJECT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def slimline(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Call the command line in this process and demand the exit code."""
        with self.lived_in():
            answer = call(*arguments, variables=self.environment)
        assert not answer.escaped, answer.escaped
        assert answer.code == code, f"exit code {answer.code}, not {code}: {answer.errors}"
        return subprocess.CompletedProcess(arguments, answer.code, answer.output, answer.errors)

    def child(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the command line to its end as users do, in a process of its own: where imports, settings that libraries
        read when they are imported, a server or the interpreter's exit are the point."""
        child = self.start(*arguments)
        output, errors = child.communicate(timeout=600)
        assert child.returncode == code, f"exit code {child.returncode}, not {code}: {errors}"
        return subprocess.CompletedProcess(arguments, child.returncode, output, errors)


def stages_run(log: str) -> list[str]:
    """Names of the stages that a log says were really run."""
    return [line.split()[1].removesuffix(":") for line in log.splitlines() if ": running, " in line]
