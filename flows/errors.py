"""Which exceptions mean "the user can mend this": the command line turns them into one sentence and exit code 2.

ValueError
├── flows.errors.SpecError            a spec, an override or a command-line value
├── flows.errors.PrefectUnusable      Prefect's settings, its server, its database
├── pruning.errors.PruningError       a model, a calibration set, numbers
├── evaluation.errors.EvaluationError a suite, a task, a protocol
└── infra.errors.InfraError           data and model sources, stores, disks
"""

from __future__ import annotations

from evaluation.errors import EvaluationError
from infra.errors import InfraError
from pruning.errors import PruningError


class SpecError(ValueError):
    """A spec, an override or a command-line value that cannot be used."""


class PrefectUnusable(ValueError):
    """Prefect's settings cannot be read, its server cannot be used, or one cannot be started."""


USER_ERRORS: tuple[type[Exception], ...] = (SpecError, PrefectUnusable, PruningError, EvaluationError, InfraError)
