"""A run that needs nothing any more: the store has all its stages, DuckDB and MLflow all that it measured."""

from __future__ import annotations

import json

from flows.branches import ends
from flows.compress import found, open_workplace
from flows.outcome import RunResult
from flows.spec import RunSpec
from flows.story import tell
from infra.keys import canonical_json
from infra.results import ResultsStore
from infra.tracking import Tracker


def recorded_result(spec: RunSpec) -> RunResult | None:
    """The result of such a run, without a flow run: of a night whose cells are all cached that is most of the time.

    None if anything is missing, or the run was recorded from a spec with other words. Raises SourceMissing and what the
    stores raise if they cannot be read.
    """
    workplace = open_workplace(spec)
    story = tell(spec, workplace.sources, workplace.settings.device)
    if not all(workplace.store.has(stage.ref) for stage in story.stages):
        return None
    results, words = ResultsStore.of(workplace.settings), canonical_json(spec.model_dump(mode="json"))
    rows = [row for row in results.runs() if row.run_key == story.run_key and row.status == "completed"]
    if not rows or canonical_json(json.loads(rows[-1].spec)) != words:
        return None
    if not Tracker(workplace.settings.tracking_uri).has(story.run_key):
        return None
    last = ends(spec.derivations)
    return RunResult(
        run_key=story.run_key,
        name=spec.name,
        stages=tuple(found(stage, workplace) for stage in story.stages),
        metrics=results.metrics(story.run_key),
        checkpoints={name: str(workplace.store.path(story.checkpoints[name])) for name in last},
    )
