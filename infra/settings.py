"""What the machine decides and a spec must not: folders, device, servers. Read from SLIMLINE_* variables."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import SettingsInvalid
from infra.registry import near

PREFIX = "SLIMLINE_"

log = logging.getLogger(__name__)


class Settings(BaseSettings):
    """Frozen settings; every field is the environment variable `SLIMLINE_<FIELD>`. None of them may change a result."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    home: Path = Field(default=Path("~/.slimline"), validate_default=True)
    mirror: str | None = None
    """Folders separated by `os.pathsep`, or the word "offline"."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:\d+)?$")
    """"auto" or a torch device such as "cpu", "cuda", "cuda:1"."""
    mlflow_uri: str | None = None
    results_db: Path | None = None
    eval_batch_size: int = Field(default=8, ge=1)
    walk_batch_size: int = Field(default=8, ge=1)
    walk_processes: int = Field(default=1, ge=1)
    """Processes that share the calibration samples of a capture or a pruning; on CUDA each has a device of its own."""
    activation_budget_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @field_validator("home", "results_db")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # Prefect runs tasks in other processes with other working directories: a relative folder would split the store.
        return None if path is None else path.expanduser().absolute()

    @property
    def store_root(self) -> Path:
        """Root of the artifact store."""
        return self.home / "store"

    @property
    def results_path(self) -> Path:
        """The DuckDB file of all results."""
        return self.results_db or self.home / "results.duckdb"

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking and registry URI."""
        return self.mlflow_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def offline_root(self) -> Path:
        """The mirror that the offline default builds for itself."""
        return self.home / "offline"


def load_settings() -> Settings:
    """Settings from the environment. Raises SettingsInvalid; warns of SLIMLINE_* variables that nobody reads."""
    _warn_of_unknown()
    try:
        return Settings()
    except ValidationError as error:
        problem = error.errors()[0]
        variable = PREFIX + str(problem["loc"][0]).upper()
        raise SettingsInvalid(
            f"environment variable {variable}={problem['input']!r} cannot be used: {problem['msg']}; change or unset it"
        ) from error


def _warn_of_unknown() -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for variable in sorted(os.environ):
        # A warning, not an error: the same environment may serve a newer slimline or somebody's own scripts.
        if variable.startswith(PREFIX) and variable not in known:
            log.warning("environment variable %s is not a setting and is ignored%s", variable, near(variable, known))
