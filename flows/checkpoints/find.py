"""Which checkpoint of a recorded run is meant, where it lies, and what is known of the model that it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import SpecError
from flows.records.lookup import find_run
from infra.artifacts.store import ArtifactRef
from infra.errors import ArtifactMissing, InfraError
from infra.models.licence import Licence, licence_of, licence_texts
from infra.registry import did_you_mean
from infra.results.rows import DENSE
from infra.sources.find import sources_from

if TYPE_CHECKING:
    from infra.artifacts.store import ArtifactStore
    from infra.results.rows import CheckpointRow, RunRow
    from infra.results.store import ResultsStore
    from infra.settings import Settings


@dataclass(frozen=True)
class Found:
    """run, row: how it is recorded. checkpoints: all of the run. folder: in the store, to be read only. dense: that of
    the run's dense checkpoint, None if it is not in the store any more."""

    run: RunRow
    row: CheckpointRow
    checkpoints: tuple[CheckpointRow, ...]
    folder: Path
    dense: Path | None

    @property
    def name(self) -> str:
        """ "<run>-<checkpoint>"."""
        return f"{self.run.name}-{self.row.checkpoint}"

    @property
    def spec(self) -> dict[str, Any]:
        """Of the run, as it is recorded."""
        return dict(json.loads(self.run.spec))

    @property
    def dense_row(self) -> CheckpointRow | None:
        """How the dense checkpoint is recorded."""
        return next((row for row in self.checkpoints if row.checkpoint == DENSE), None)


def find_checkpoint(results: ResultsStore, artifacts: ArtifactStore, run: str, checkpoint: str | None) -> Found:
    """The checkpoint of that name in the run of that key or name; without a name the one that the run ends in.

    Raises SpecError for an unknown run or checkpoint, for a run that ends in several, and for one that is not in the
    store any more.
    """
    row = find_run(results, run)
    checkpoints = results.checkpoints(row.run_key)
    if not checkpoints:
        raise SpecError(
            f"run {row.run_key} has no finished checkpoint that is recorded; `slimline retry {row.name}` makes and "
            "records them"
        )
    chosen = _chosen(row, checkpoints, checkpoint)
    try:
        folder = artifacts.path(ArtifactRef(kind="checkpoint", key=chosen.checkpoint_key))
    except ArtifactMissing as missing:
        raise SpecError(
            f"checkpoint {chosen.checkpoint} of run {row.name} is not whole in the store: {missing}; "
            f"`slimline retry {row.name}` makes it again"
        ) from missing
    return Found(row, chosen, checkpoints, folder, _dense(artifacts, checkpoints))


def base_licence(found: Found, settings: Settings) -> tuple[Licence | None, tuple[Path, ...]]:
    """The licence of the model that the run began with, and the files that have to go along with its weights: from what
    was imported, else from where the model lies now, if that is on this machine."""
    for place in (found.dense, _source(found, settings)):
        if place is not None and ((licence := licence_of(place)) or licence_texts(place)):
            return licence, licence_texts(place)
    return None, ()


def _chosen(run: RunRow, checkpoints: tuple[CheckpointRow, ...], name: str | None) -> CheckpointRow:
    names = [row.checkpoint for row in checkpoints]
    if name is None:
        sources = {row.source for row in checkpoints}
        ends = [row for row in checkpoints if row.checkpoint not in sources]
        if len(ends) == 1:
            return ends[0]
        raise SpecError(
            f"run {run.name} ends in {len(ends)} checkpoints; choose one with --checkpoint: {', '.join(names)}"
        )
    if name not in names:
        raise SpecError(
            f"run {run.name} has no checkpoint {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}"
        )
    return checkpoints[names.index(name)]


def _dense(artifacts: ArtifactStore, checkpoints: tuple[CheckpointRow, ...]) -> Path | None:
    for row in checkpoints:
        if row.checkpoint == DENSE:
            ref = ArtifactRef(kind="checkpoint", key=row.checkpoint_key)
            return artifacts.path(ref) if artifacts.has(ref) else None
    return None


def _source(found: Found, settings: Settings) -> Path | None:
    """Where the run's model lies, without asking the hub."""
    spec = found.spec
    model = spec.get("model") or {}
    try:
        sources = sources_from(spec.get("mirror"), settings, start=spec.get("folder"))
        sources.hub = False
        return sources.find(str(model.get("id", "")), "model", revision=model.get("revision")).folder
    except InfraError:
        return None
