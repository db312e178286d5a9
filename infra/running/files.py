"""The files that say what runs: `<home>/running/runs/<id>.json` and `<home>/running/stages/<stage key>.json`.

A flow run holds a lock beside its file as long as it lives, so one that was killed is told from one that runs. Nothing
here is needed to go on, and none of it may end a run: what cannot be written is not written.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from infra.filesystem.locks import flocked
from infra.secrets import redacted

#: seconds between two writes of how far a stage is
_INTERVAL = 1.0
#: seconds for which the files of what has ended are kept
_KEPT = 14 * 24 * 3600.0

log = logging.getLogger("slimline")


class _File(BaseModel):
    model_config = ConfigDict(frozen=True)

    host: str = Field(default_factory=socket.gethostname)
    process: int = Field(default_factory=os.getpid)
    began_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))


class StageOfRun(BaseModel):
    """One stage of a run. refreshed: it is made although it was made before the run. status, seconds and message: how
    it ended, once the run has; seconds as in the store."""

    model_config = ConfigDict(frozen=True)

    name: str
    key: str
    kind: str
    refreshed: bool = False
    status: Literal["completed", "cached", "failed", "skipped"] | None = None
    seconds: float | None = None
    message: str | None = None


class FollowedRun(_File):
    """A run of a spec or of a night: `key` is its run key or night id, `id` that of Prefect's flow run.

    part_of: the id of the night, of its cells. model: that the stages are about. cells: of a night, each with the name
    of its run. exit_code: None while it runs, then what its command ends with.
    """

    id: str
    kind: Literal["run", "night"]
    key: str
    name: str
    part_of: str | None = None
    model: str = ""
    stages: tuple[StageOfRun, ...] = ()
    cells: dict[str, str] = {}
    ended_at: AwareDatetime | None = None
    exit_code: int | None = None
    message: str | None = None


class RunningStage(_File):
    """A stage that is being made, or whose making failed (`failed`: why). share: done, in [0, 1], as last told."""

    name: str
    key: str
    share: float = 0.0
    message: str = ""
    failed: str | None = None

    @property
    def alive(self) -> bool:
        """Whether the process that makes it is there, as far as can be seen from this machine."""
        if self.failed is not None or self.host != socket.gethostname():
            return self.failed is None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


F = TypeVar("F", bound=_File)


class RunningFiles:
    """The files in `folder`, which is made when something is written."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "running"

    @contextmanager
    def following(self, run: FollowedRun) -> Iterator[Callable[[FollowedRun], None]]:
        """Say that a run runs while the block lasts. Call what it yields to replace what is said of it."""
        path = self._run_path(run.id)
        with ExitStack() as held:
            with _not_worth_a_run(run.name):
                path.parent.mkdir(parents=True, exist_ok=True)
                if run.part_of is None:
                    self._clear_up()
                _hold(path.with_suffix(".lock"), held)
            self.write(run)
            yield self.write

    def write(self, run: FollowedRun) -> None:
        """Replace the file of a run."""
        with _not_worth_a_run(run.name):
            _replace(self._run_path(run.id), run)

    @contextmanager
    def making(self, name: str, key: str) -> Iterator[Callable[[float, str], None]]:
        """Say that this process makes a stage while the block lasts, and afterwards, if it raised, why it failed. Call
        what it yields with the share done and a few words, as often as you like."""
        path = self.folder / "stages" / f"{key}.json"
        stage, written = RunningStage(name=name, key=key), -_INTERVAL

        def tell(share: float, message: str) -> None:
            nonlocal written
            if time.monotonic() - written < _INTERVAL:
                return
            written = time.monotonic()
            with _not_worth_a_run(name):
                path.parent.mkdir(parents=True, exist_ok=True)
                _replace(path, stage.model_copy(update={"share": min(1.0, max(0.0, share)), "message": message}))

        tell(0.0, "")
        written = -_INTERVAL
        try:
            yield tell
        except BaseException as error:
            words = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(": ")
            with _not_worth_a_run(name):
                _replace(path, stage.model_copy(update={"failed": redacted(words)}))
            raise
        with _not_worth_a_run(name):
            path.unlink(missing_ok=True)

    def runs(self, since: datetime | None = None) -> list[FollowedRun]:
        """Of the last two weeks, or that began since then, whether they run or not, the newest last."""
        found = (_read(path, FollowedRun) for path in (self.folder / "runs").glob("*.json") if _written(path, since))
        begun = (run for run in found if run and (since is None or run.began_at >= since))
        return sorted(begun, key=lambda run: run.began_at)

    def run(self, id_: str) -> FollowedRun | None:
        """That one, if it is still known."""
        return _read(self._run_path(id_), FollowedRun)

    def stage(self, key: str) -> RunningStage | None:
        """The stage of that key, if it is being made or failed when it was made last."""
        return _read(self.folder / "stages" / f"{key}.json", RunningStage)

    def is_alive(self, run: FollowedRun) -> bool:
        """Whether it has not ended, nor its process died."""
        lock = self._run_path(run.id).with_suffix(".lock")
        if run.ended_at is not None or not lock.exists():
            return False
        with flocked(lock, wait=False) as dead:
            return not dead

    def _run_path(self, id_: str) -> Path:
        return self.folder / "runs" / f"{id_}.json"

    def _clear_up(self) -> None:
        """Remove files that nobody has written for long; who runs still holds its lock."""
        for path in [*self.folder.glob("runs/*.json"), *self.folder.glob("stages/*")]:
            with suppress(FileNotFoundError):
                run = _read(path, FollowedRun) if path.parent.name == "runs" else None
                if time.time() - path.stat().st_mtime > _KEPT and not (run and self.is_alive(run)):
                    path.unlink()
                    path.with_suffix(".lock").unlink(missing_ok=True)


def ended(run: FollowedRun, exit_code: int, message: str | None, stages: Sequence[StageOfRun] = ()) -> FollowedRun:
    """The run after its end. stages: what came of each, if that is known."""
    known = {"stages": tuple(stages)} if stages else {}
    return run.model_copy(update={"ended_at": datetime.now(UTC), "exit_code": exit_code, "message": message, **known})


def _hold(lock: Path, held: ExitStack) -> None:
    """Hold the lock until `held` ends. Who looks whether we live holds it for a moment: nobody waits for long."""
    for _ in range(20):
        ours = held.enter_context(flocked(lock, wait=False))
        if ours:
            held.callback(lock.unlink, missing_ok=True)
            return
        time.sleep(0.01)


def _replace(path: Path, content: _File) -> None:
    """As a whole; not forced to the disk: after a power cut nothing runs that could be followed."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        aside.write_text(content.model_dump_json(), encoding="utf-8")
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _written(path: Path, since: datetime | None) -> bool:
    """Whether it was since then: what was not need not be read. Clocks of a shared disk may differ a little."""
    with suppress(FileNotFoundError):
        return since is None or path.stat().st_mtime > since.timestamp() - 600
    return False


def _read(path: Path, kind: type[F]) -> F | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):  # gone meanwhile; of another version
        return None


@contextmanager
def _not_worth_a_run(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk, a folder that is not ours, a file system without locks
        log.debug("%s: how far it is cannot be written down: %s", name, error)
