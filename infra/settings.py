"""What the machine decides and a spec must not: folders, device, servers. Read from SLIMLINE_* variables."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import SettingsInvalid
from infra.registry import did_you_mean

PREFIX = "SLIMLINE_"
OFFLINE_WORD = "offline"
HUB_WORD = "hub"

#: of what is counted in memory, rows and GiB; and of the processes of one machine
_LARGEST, _MOST_PROCESSES = 2**31 - 1, 1024

log = logging.getLogger("slimline")


class Settings(BaseSettings):
    """Frozen settings; every field is the environment variable `SLIMLINE_<FIELD>`. None of them may change a result."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    home: Path = Field(default=Path("~/.slimline"), validate_default=True)
    """Artifact store, results, MLflow database."""
    mirror: str | None = None
    """Where models and data come from: folders and the words "offline" and "hub", joined by `:`; default: the hub."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:\d+)?$")
    """"auto" (every CUDA device, one stage each), "balanced" (each model spread over all), "cpu", "cuda:1"."""
    mlflow_uri: str | None = None
    """An MLflow server; default: a file in `SLIMLINE_HOME`."""
    results_db: Path | None = None
    """Another DuckDB file than results.duckdb in `SLIMLINE_HOME`."""
    results_folder: Path | None = None
    """Folder of the results' files, may be shared by machines (keep `SLIMLINE_RESULTS_DB` local to each); default:
    `results/` beside the DuckDB file, their index."""
    eval_batch_size: Annotated[int, Field(ge=1, le=_LARGEST)] | Literal["auto"] = "auto"
    """Most rows per forward pass of an evaluation; "auto" is as many as keep the device busy."""
    eval_processes: int = Field(default=1, ge=1, le=_MOST_PROCESSES)
    """Processes that share the rows of one suite; on CUDA each has a device of its own."""
    walk_batch_size: int = Field(default=8, ge=1, le=_LARGEST)
    """Calibration windows per forward pass."""
    walk_processes: int = Field(default=1, ge=1, le=_MOST_PROCESSES)
    """Processes that share the calibration windows of one pruning or capture; on CUDA each has a device of its own."""
    train_processes: int | None = Field(default=None, ge=1, le=_MOST_PROCESSES)
    """Processes that share the batches of one training (default: one per CUDA device)."""
    train_sharded: bool | None = None
    """Whether a training of all weights lies in pieces over these processes (FSDP2) or whole in each (DDP). Default: in
    pieces where it does not fit otherwise. Adapters are trained on whole models."""
    activation_budget_gib: float | None = Field(default=None, gt=0, le=_LARGEST, allow_inf_nan=False)
    """Host memory for activations of the calibration windows; beyond it they lie in files. Default: half of what is
    free."""
    device_activation_budget_gib: float | None = Field(default=None, ge=0, le=_LARGEST, allow_inf_nan=False)
    """Memory of the GPU for them; beyond it they lie on the host. Default: what is free, less what the walk needs."""
    disk_budget_gib: float | None = Field(default=None, gt=0, le=_LARGEST, allow_inf_nan=False)
    """Size the artifact store may reach; each stage's need is checked before it starts. Default: free disk only."""
    device_lease: Literal["host", "server"] = "host"
    """Who must agree that an accelerator is free: "host", or "server" too (containers that share a GPU but no `/tmp`;
    needs `PREFECT_API_URL`)."""
    runner: Literal["threads", "dask", "ray"] = "threads"
    """Where stages run; of a command, `--runner` goes before it."""
    runner_address: str | None = None
    """A Dask or Ray cluster that runs already."""
    runner_workers: int | None = Field(default=None, ge=1, le=_MOST_PROCESSES)
    """Size of the cluster that slimline starts (default: one process per device, 2 on a CPU), or number of threads
    (default: 16, of a night 4)."""
    retries: int = Field(default=3, ge=0, le=20)
    """Further tries of a stage after network and out-of-memory errors."""
    retry_delay: float = Field(default=10, gt=0, le=86_400, allow_inf_nan=False)
    """Seconds before the first of them; each pause doubles."""
    remote: str | None = None
    """Object store behind the artifact store: `s3://bucket/prefix`, `gs://...`, `file:///folder`."""

    @field_validator("home", "results_db", "results_folder")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # Prefect runs tasks in other processes with other working directories: a relative folder would split the store.
        try:
            return None if path is None else path.expanduser().absolute()
        except RuntimeError as error:  # ~nobody/x
            raise ValueError(f"{error}".lower()) from error

    @field_validator("results_db")
    @classmethod
    def _named(cls, path: Path | None) -> Path | None:
        if path is not None and not path.name:
            raise ValueError("it is the root folder; give the path of a file")
        return path

    @property
    def store_root(self) -> Path:
        """Root of the artifact store."""
        return self.home / "store"

    @property
    def results_path(self) -> Path:
        """The DuckDB file over all results."""
        return self.results_db or self.home / "results.duckdb"

    @property
    def results_root(self) -> Path:
        """The folder of the results' files."""
        return self.results_folder or default_results_folder(self.results_path)

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking and registry URI."""
        return self.mlflow_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def offline_root(self) -> Path:
        """The mirror that the offline default builds for itself."""
        return self.home / "offline"


def mirror_entries(mirror: str | Sequence[str]) -> list[str]:
    """The entries of a mirror setting: folders and words."""
    entries = mirror.split(os.pathsep) if isinstance(mirror, str) else mirror
    return [entry for entry in entries if entry]


def mirror_folders(mirror: str | Sequence[str]) -> list[str]:
    """Those of the entries that are folders."""
    return [entry for entry in mirror_entries(mirror) if entry not in (OFFLINE_WORD, HUB_WORD)]


def absolute_mirror(mirror: str) -> str:
    """The setting with relative folders made absolute."""
    folders = {entry: os.path.abspath(os.path.expanduser(entry)) for entry in mirror_folders(mirror)}
    return os.pathsep.join(folders.get(entry, entry) for entry in mirror_entries(mirror))


def default_results_folder(results_path: Path) -> Path:
    """Where the results' files are by default: beside their index, with its name less the suffix."""
    if results_path.suffix:
        return results_path.with_suffix("")
    return results_path.with_name(f"{results_path.name}.files")


def load_settings() -> Settings:
    """Settings from the environment. Raises SettingsInvalid; warns of SLIMLINE_* variables that nobody reads."""
    _warn_of_unknown()
    try:
        return Settings()
    except ValidationError as error:
        problem = error.errors()[0]
        variable = PREFIX + str(problem["loc"][0]).upper()
        raise SettingsInvalid(
            f"environment variable {variable}={problem['input']!r} cannot be used: "
            f"{problem['msg'].removeprefix('Value error, ')}; change or unset it"
        ) from error


def _warn_of_unknown() -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for variable in sorted(os.environ):
        # A warning, not an error: the same environment may serve a newer slimline or somebody's own scripts.
        if variable.startswith(PREFIX) and variable not in known:
            log.warning(
                "environment variable %s is not a setting and is ignored%s", variable, did_you_mean(variable, known)
            )
