"""Which exceptions mean "the user can mend this": the command line turns them into one sentence and exit code 2.

ValueError
├── flows.errors.SpecError            a spec, an override or a command-line value
├── flows.errors.PrefectUnusable      Prefect's settings, its server, its database
├── pruning.errors.PruningError       a model, a calibration set, numbers
├── evaluation.errors.EvaluationError a suite, a task, a protocol
└── infra.errors.InfraError           data and model sources, stores, disks
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from evaluation.errors import EvaluationError
from infra.errors import InfraError
from pruning.errors import PruningError

if TYPE_CHECKING:
    from flows.outcome import RunResult


class SpecError(ValueError):
    """A spec, an override or a command-line value that cannot be used."""


class PrefectUnusable(ValueError):
    """Prefect's settings cannot be read, its server cannot be used, or one cannot be started."""


class StagesFailed(RuntimeError):
    """Some stages of a run failed; the message names each with its reason.

    result: what the others came to. by_user: all failures are of the kind that the user can mend.
    """

    def __init__(self, message: str, *, result: RunResult, by_user: bool) -> None:
        super().__init__(message)
        self.result = result
        self.by_user = by_user

    def __reduce__(self) -> tuple[Any, ...]:
        """Of keyword arguments pickle knows nothing; a cell of a night may run in another process."""
        return partial(StagesFailed, result=self.result, by_user=self.by_user), self.args


USER_ERRORS: tuple[type[Exception], ...] = (SpecError, PrefectUnusable, PruningError, EvaluationError, InfraError)
