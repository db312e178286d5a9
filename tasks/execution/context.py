"""What a stage is given and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, model_validator

from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.settings import Settings, load_settings
from infra.sources.find import Sources
from tasks.devices.placement import Placement
from tasks.execution.curves import Curves, InRun, no_curves
from tasks.execution.progress import Progress


@dataclass(frozen=True)
class RunContext:
    """What a stage may use besides its request; none of it changes the answer, so none of it is in a key."""

    settings: Settings
    sources: Sources
    refreshed_since: datetime | None = None
    """A stage that is to be refreshed and was made after this moment has been refreshed."""
    part_of: UUID | None = None
    """The night's flow run, if it is one of its cells: when that is interrupted, the cell starts no further stage."""
    in_run: InRun | None = None
    """Where the curves of a training are shown while it trains."""

    @property
    def store(self) -> ArtifactStore:
        """Where artifacts live."""
        return ArtifactStore(self.settings.store_root)


@dataclass(frozen=True)
class StageContext:
    """What a running stage is given: a folder to fill, a device if it asked for one, and ways to report progress and
    the curves of a training."""

    run_context: RunContext
    folder: Path
    ref: ArtifactRef
    given_place: Placement | None
    progress: Progress
    curves: Curves = no_curves

    @property
    def store(self) -> ArtifactStore:
        """Where artifacts live."""
        return self.run_context.store

    @property
    def place(self) -> Placement:
        """Where a stage that was declared with devices computes."""
        assert self.given_place is not None, "this stage was declared without devices"
        return self.given_place


class StageResult(BaseModel):
    """What a stage returns and Prefect caches: a reference that checks, whenever it is decoded, that the artifact is
    still whole. If it is not, decoding fails and Prefect runs the stage again."""

    model_config = ConfigDict(frozen=True)

    ref: ArtifactRef
    seconds: float
    found: bool = False

    @model_validator(mode="after")
    def _still_there(self) -> Self:
        if not ArtifactStore(load_settings().store_root).has(self.ref):
            raise ValueError(f"{self.ref.kind} {self.ref.key} is no longer in the store")
        return self
