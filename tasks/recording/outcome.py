"""What a run came to, as the stage that records it is given it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from infra.artifacts.store import ArtifactRef
from infra.results.lineage import Made
from infra.results.rows import StageRow


class Measured(BaseModel):
    """A finished report stage: what it measured (`suite`) about which checkpoint or exported file. leaks: a sentence
    for each training of the checkpoint on what is measured. vocabulary: key of the step that gave it another than the
    dense model's, "" if none did."""

    model_config = ConfigDict(frozen=True)

    report: ArtifactRef
    suite: str
    label: str
    checkpoint_name: str
    checkpoint: ArtifactRef
    leaks: tuple[str, ...] = ()
    vocabulary: str = ""


class RunOutcome(BaseModel):
    """All that there is to record about a run. `checkpoints`: the finished ones by name; `lineage`: how they
    are made; `files`: exported from them, those that were measured."""

    model_config = ConfigDict(frozen=True)

    run_key: str
    name: str
    spec: dict[str, Any]
    started_at: datetime
    stages: tuple[StageRow, ...]
    checkpoints: dict[str, ArtifactRef]
    files: dict[str, ArtifactRef] = {}
    lineage: tuple[Made, ...] = ()
    measured: tuple[Measured, ...]
    failed: bool
    message: str | None
