"""The small night that faults are done to, how it looks when nobody disturbs it, and what a fault cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from infra.artifacts.store import MANIFEST, ArtifactRef
from infra.results.rows import MetricRow
from tests.command_line import call
from tests.flows.home import Home

#: files that also say how long things took
TIMED = frozenset({"pruning.json", "recovery.json"})
_KINDS = ("checkpoint", "calibration", "statistics", "report")


@dataclass(frozen=True)
class Scene:
    """A folder to work in, the command that runs the night, and the night as it is when nobody disturbs it."""

    folder: Path
    offline: Path
    api_url: str
    blank_mlflow: Path
    overrides: tuple[str, ...]
    reference: Picture = field(repr=False)
    seconds: float
    """What the undisturbed night took."""
    in_process: bool = False
    """Whether nights that nobody disturbs run in this process: a child spends seconds on imports."""

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of `slimline`."""
        return night_command(self.overrides)

    def home(self, name: str) -> Home:
        """An empty home with the tables of MLflow and nothing in them."""
        return Home.create(self.folder / name / "home", self.offline, self.api_url, self.blank_mlflow)

    def run(self, home: Home) -> tuple[int | None, str]:
        """Run the night to its end; its exit code and what it said on standard error."""
        if not self.in_process:
            child = home.start(*self.command)
            _output, errors = child.communicate(timeout=600)
            return child.returncode, errors
        with home.lived_in():
            answer = call(*self.command, variables=home.environment)
        return answer.code, answer.errors + answer.escaped

    def finished_home(self, name: str) -> Home:
        """A copy of the home of the undisturbed night."""
        return Home(self.folder / "reference" / "home", self.api_url).copy(self.folder / name / "home")


@dataclass(frozen=True)
class Picture:
    """What a night leaves: hashes of every file of every artifact, every cell's figures, status of every night."""

    artifacts: dict[ArtifactRef, dict[str, str]]
    metrics: frozenset[MetricRow]
    runs: frozenset[tuple[str, str]]
    """(run key, status)"""


@dataclass(frozen=True)
class Survival:
    """What became of one fault. problems: none if the night survived it."""

    fault: str
    problems: tuple[str, ...]
    stages_repeated: int = 0
    rows_lost: int = 0

    @property
    def survived(self) -> bool:
        """Whether the next run completed, its results are those of the undisturbed night, and nothing was lost."""
        return not self.problems and not self.stages_repeated and not self.rows_lost


def night_command(overrides: Sequence[str]) -> tuple[str, ...]:
    return ("nightly", "smoke", *(part for override in overrides for part in ("--set", override)))


def picture(home: Home) -> Picture:
    return Picture(
        artifacts={ref: hashes(home, ref) for ref in finished(home)},
        metrics=frozenset(home.results.metrics()),
        runs=frozenset((row.run_key, row.status) for row in home.results.runs()),
    )


def hashes(home: Home, ref: ArtifactRef) -> dict[str, str]:
    files = home.store.manifest(ref).files
    return {name: entry.sha256 for name, entry in files.items() if name not in TIMED}


def finished(home: Home) -> set[ArtifactRef]:
    """Artifacts that the store counts as complete."""
    found = {ArtifactRef(kind=kind, key=key) for kind, key in _folders(home)}
    return {ref for ref in found if home.store.has(ref)}


def half_made(home: Home) -> list[str]:
    """Everything that is visible in the store and not whole."""
    problems = []
    for kind, key in _folders(home):
        folder = home.store.root / kind / key
        if not (folder / MANIFEST).is_file():
            problems.append(f"{kind} {key} has no manifest")
        else:
            problems += [f"{key}: {problem}" for problem in home.store.verify(ArtifactRef(kind=kind, key=key))]
    return problems


def _folders(home: Home) -> Iterator[tuple[str, str]]:
    for kind in _KINDS:
        for folder in sorted((home.store.root / kind).glob("*")):
            yield kind, folder.name


def keys_run(log: str) -> list[str]:
    """Keys of the stages that a log says were really run, in order."""
    return [line.partition(": running, ")[2].split()[0] for line in log.splitlines() if ": running, " in line]


def again(scene: Scene, home: Home, fault: str, *, spared: frozenset[str] = frozenset()) -> Survival:
    """Run the night in a home that met a fault, and compare with the undisturbed one.

    spared: keys that the fault itself struck, which may be made again.
    """
    whole = {ref.key for ref in finished(home)}
    code, errors = scene.run(home)
    problems = [] if code == 0 else [f"the next run ended with {code}: {errors[-500:]}"]
    return judged(scene, home, fault, keys_run(errors), whole - spared, problems)


def judged(
    scene: Scene, home: Home, fault: str, ran: Sequence[str], whole: set[str], problems: Sequence[str] = ()
) -> Survival:
    """What a fault cost, after the run that followed it. ran: keys that this one ran; whole: what it found whole."""
    found, expected = picture(home), scene.reference
    problems = [*problems, *half_made(home)]
    for ref in expected.artifacts.keys() - found.artifacts.keys():
        problems.append(f"{ref.key} is missing")
    for ref in expected.artifacts.keys() & found.artifacts.keys():
        if expected.artifacts[ref] != found.artifacts[ref]:
            problems.append(f"{ref.key} is another than that of the undisturbed night")
    if found.metrics - expected.metrics:
        problems.append(f"{len(found.metrics - expected.metrics)} figures differ")
    left = list(home.store.root.glob(".writing/*"))
    if left:
        problems.append(f"left behind: {', '.join(path.name for path in left)}")
    repeated = [key for key in ran if key in whole] + [key for key in set(ran) for _ in range(ran.count(key) - 1)]
    lost = len(expected.metrics - found.metrics) + len(expected.runs - found.runs)
    return Survival(fault, tuple(problems), len(repeated), lost)


def port_free() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def prefect_server(folder: Path, port: int) -> Iterator[str]:
    """A Prefect server of our own with its database in `folder`; yields its API's URL once it answers."""
    environment = dict(os.environ) | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("ab") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}/api"
        _wait_for(f"{url}/health", child)
        yield url
    finally:
        child.terminate()
        child.wait(30)


def _wait_for(url: str, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert child.poll() is None, "the Prefect server ended"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise TimeoutError(url)
