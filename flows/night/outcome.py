"""Results of a night: cells, figures compared with the last good night, gates."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from flows.run.outcome import StageOutcome
from infra.results.rows import MetricRow, NightFigureRow


class CellOutcome(BaseModel):
    """One cell; stages and metrics are empty if its run could not begin. seconds: wall time in this night."""

    model_config = ConfigDict(frozen=True)

    name: str
    run_key: str | None
    seconds: float
    stages: tuple[StageOutcome, ...] = ()
    metrics: tuple[MetricRow, ...] = ()
    message: str | None = None
    by_user: bool = False

    @property
    def status(self) -> Literal["completed", "failed"]:
        """Failed if a stage failed or the run could not begin."""
        return "completed" if self.message is None else "failed"

    def count(self, status: str) -> int:
        """Stages of this status."""
        return sum(stage.status == status for stage in self.stages)


class CellFailed(RuntimeError):
    """Raised by a cell's task, so that Prefect shows it as failed; carries the cell's outcome."""

    def __init__(self, outcome: CellOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome

    def __str__(self) -> str:
        return str(self.outcome.message)


GUARDS_NOTHING = "it matches no figure, so it guards nothing"


class GateOutcome(BaseModel):
    """One gate of the spec. num_figures: how many it guards. problems: a sentence for each that does not hold."""

    model_config = ConfigDict(frozen=True)

    gate: str
    num_figures: int
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it guards something and all of that holds."""
        return self.num_figures > 0 and not self.problems

    @property
    def problem(self) -> str | None:
        """Why it does not hold; None if it does."""
        return None if self.passed else "; ".join(self.problems) or GUARDS_NOTHING


class NightResult(BaseModel):
    """Everything that is recorded and printed of a night. seconds: wall time."""

    model_config = ConfigDict(frozen=True)

    night_id: str
    name: str
    previous_night_id: str | None
    cells: tuple[CellOutcome, ...]
    figures: tuple[NightFigureRow, ...]
    gates: tuple[GateOutcome, ...]
    seconds: float

    @property
    def status(self) -> Literal["completed", "failed"]:
        """Failed if a cell failed; gates are another matter."""
        return "failed" if self.failures else "completed"

    @property
    def failures(self) -> tuple[CellOutcome, ...]:
        """The cells that failed."""
        return tuple(cell for cell in self.cells if cell.status == "failed")

    @property
    def gates_passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    @property
    def stages(self) -> dict[str, StageOutcome]:
        """Each key once, with the outcome that says most: run, else failed, else cached, else skipped."""
        rank = ("skipped", "cached", "failed", "completed")
        best: dict[str, StageOutcome] = {}
        for stage in (stage for cell in self.cells for stage in cell.stages):
            if stage.key not in best or rank.index(stage.status) > rank.index(best[stage.key].status):
                best[stage.key] = stage
        return best

    def count(self, status: str) -> int:
        """Distinct stages of this status; a stage that cells share counts once."""
        return sum(stage.status == status for stage in self.stages.values())

    @property
    def message(self) -> str | None:
        """Why the night is not good, in one line; None if it is."""
        problems = [f"{cell.name}: {cell.message}" for cell in self.failures]
        problems += [f"gate {gate.gate}: {gate.problem}" for gate in self.gates if not gate.passed]
        return "; ".join(problems) or None


class NightFailed(RuntimeError):
    """A night in which cells failed or gates did not hold, raised after everything is recorded."""

    def __init__(self, result: NightResult) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        return str(self.result.message)

    @property
    def by_user(self) -> bool:
        """Whether all failures are of the kind that the user can mend."""
        return all(cell.by_user for cell in self.result.failures)
