"""How far a run or a night is: what its file says, what the store holds, what is being made now, what is left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from flows.watch.forecast import Timings
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import ArtifactMissing
from infra.running.files import FollowedRun, RunningFiles, StageOfRun

Status = Literal["done", "cached", "running", "failed", "skipped", "waiting"]

#: of a stage that has just begun the share says nothing about its end
_TELLING_SHARE = 0.05


@dataclass(frozen=True)
class StageState:
    """One stage. seconds: it took, or has taken so far. left: seconds until its end; None where nobody knows."""

    name: str
    key: str
    status: Status
    seconds: float | None = None
    share: float = 0.0
    message: str = ""
    left: float | None = None


@dataclass(frozen=True)
class RunState:
    """One run at a moment. cells: of a night, by name; None for one that has not begun."""

    run: FollowedRun
    alive: bool
    stages: tuple[StageState, ...]
    cells: dict[str, RunState | None]
    at: datetime

    def count(self, *statuses: Status) -> int:
        """Stages with one of these."""
        return sum(stage.status in statuses for stage in self.stages)

    @property
    def running(self) -> list[StageState]:
        """What is being made."""
        return [stage for stage in self.stages if stage.status == "running"]

    @property
    def seconds(self) -> float:
        """Since its beginning, to now or to its end."""
        return ((self.run.ended_at or self.at) - self.run.began_at).total_seconds()

    @property
    def not_begun(self) -> int:
        """Cells of which nobody knows the stages yet."""
        return sum(cell is None for cell in self.cells.values())

    @property
    def left(self) -> float | None:
        """Seconds until the end: what is left of all stages, so many at once as run now, and cells that have not begun
        at the pace of those that ended. None if that is known of nothing."""
        unfinished = [stage for stage in self.stages if stage.status in ("running", "waiting")]
        known = [stage.left for stage in unfinished if stage.left is not None]
        ended = sum(cell is not None and not cell.alive for cell in self.cells.values())
        if (unfinished and not known) or (self.not_begun and not ended):
            return None
        at_once = max(1, len(self.running))
        longest = max((stage.left or 0.0 for stage in self.running), default=0.0)
        return max(longest, sum(known) / at_once) + (self.not_begun * self.seconds / ended if ended else 0.0)

    @property
    def uncounted(self) -> int:
        """Stages that `left` leaves out, since nothing like them was timed before."""
        return sum(stage.status in ("running", "waiting") and stage.left is None for stage in self.stages)


class Watcher:
    """Looks at a run again and again; what is finished is not looked at twice."""

    def __init__(self, files: RunningFiles, store: ArtifactStore, timings: Timings) -> None:
        self._files, self._store, self._timings = files, store, timings
        self._made: dict[str, tuple[datetime, float]] = {}

    def look(self, run: FollowedRun, since: datetime | None = None) -> RunState:
        """How far it is now. run: as it was when it was looked at last. since: what was made then was made for it."""
        now = datetime.now(UTC)
        run = self._files.run(run.id) or run
        alive = self._files.is_alive(run)
        if not alive:  # it may have ended in between, and said how
            run = self._files.run(run.id) or run
        if run.kind == "run":
            since = since or run.began_at
            stages = tuple(self._stage(stage, run, since, now if alive else None) for stage in run.stages)
            return RunState(run, alive, stages, {}, now)
        begun = {each.name: each for each in self._files.runs(run.began_at) if each.part_of == run.id}
        cells = {
            cell: self.look(begun[name], run.began_at) if name in begun else None for cell, name in run.cells.items()
        }
        return RunState(run, alive, _once(cell.stages for cell in cells.values() if cell), cells, now)

    def _stage(self, stage: StageOfRun, run: FollowedRun, since: datetime, now: datetime | None) -> StageState:
        """now: None if its run is not alive, so that nothing is being made for it."""
        if stage.status is not None:
            status: Status = "done" if stage.status == "completed" else stage.status
            return StageState(stage.name, stage.key, status, stage.seconds, message=stage.message or "")
        making = self._files.stage(stage.key)
        expected = self._timings.expected(stage.key, run.model)
        if making and making.alive and now:
            so_far = (now - making.began_at).total_seconds()
            left = _left(so_far, making.share, expected)
            return StageState(stage.name, stage.key, "running", so_far, making.share, making.message, left)
        if making and making.failed and making.began_at >= since:
            return StageState(stage.name, stage.key, "failed", message=making.failed)
        made_at, seconds = self._when_made(stage) or (None, None)
        if made_at is None or (stage.refreshed and made_at < since):
            return StageState(stage.name, stage.key, "waiting", left=expected)
        return StageState(stage.name, stage.key, "done" if made_at >= since else "cached", seconds)

    def _when_made(self, stage: StageOfRun) -> tuple[datetime, float] | None:
        if stage.refreshed or stage.key not in self._made:
            try:
                ref = ArtifactRef.model_validate({"kind": stage.kind, "key": stage.key})
                manifest = self._store.manifest(ref)
            except ArtifactMissing:
                return None
            self._made[stage.key] = (manifest.created_at, manifest.seconds)
        return self._made[stage.key]


def _left(so_far: float, share: float, expected: float | None) -> float | None:
    if share >= _TELLING_SHARE:
        return so_far * (1 - share) / share
    return None if expected is None else max(0.0, expected - so_far)


def _once(cells: Iterable[Sequence[StageState]]) -> tuple[StageState, ...]:
    """What cells share is one stage: the state that says most."""
    rank: tuple[Status, ...] = ("waiting", "skipped", "cached", "failed", "done", "running")
    best: dict[str, StageState] = {}
    for stage in (stage for stages in cells for stage in stages):
        if stage.key not in best or rank.index(stage.status) > rank.index(best[stage.key].status):
            best[stage.key] = stage
    return tuple(best.values())
