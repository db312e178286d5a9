"""What a run came to: per stage its key, whether it ran, how long, and why it failed."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from infra.results.rows import MetricRow


class StageOutcome(BaseModel):
    """One stage of a finished run; `seconds` is the time it took when it ran, also if that was an earlier run."""

    model_config = ConfigDict(frozen=True)

    name: str
    key: str
    kind: str
    status: Literal["completed", "cached", "failed", "skipped"]
    seconds: float | None
    message: str | None = None
    by_user: bool = False

    @property
    def cached(self) -> bool:
        """Whether the artifact was there already."""
        return self.status == "cached"


class RunResult(BaseModel):
    """What the flow returns. checkpoints: for each branch, the name of its last checkpoint and the folder, if made."""

    model_config = ConfigDict(frozen=True)

    run_key: str
    name: str
    stages: tuple[StageOutcome, ...]
    metrics: tuple[MetricRow, ...]
    checkpoints: dict[str, str | None]

    @property
    def checkpoint(self) -> str | None:
        """Folder of the last checkpoint of the run, that of the last branch if there are several."""
        return list(self.checkpoints.values())[-1]

    @property
    def failures(self) -> tuple[StageOutcome, ...]:
        """The stages that failed themselves (not those that were skipped because of them)."""
        return tuple(stage for stage in self.stages if stage.status == "failed")


class StagesFailed(RuntimeError):
    """Some stages of a run failed; the message names each with its reason.

    result: what the others came to. by_user: all failures are of the kind that the user can mend.
    """

    def __init__(self, message: str, *, result: RunResult, by_user: bool) -> None:
        super().__init__(message)
        self.result = result
        self.by_user = by_user

    @property
    def exit_code(self) -> int:
        """Of a command that ends with it."""
        return 2 if self.by_user else 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Of keyword arguments pickle knows nothing; a cell of a night may run in another process."""
        return partial(StagesFailed, result=self.result, by_user=self.by_user), self.args
