"""A run that needs nothing any more: the store has all its stages, DuckDB and MLflow all that it measured."""

from __future__ import annotations

import json

from flows.run.compress import found, open_run_context
from flows.run.outcome import RunResult
from flows.run.stages import build_stages
from flows.spec.branches import ends
from flows.spec.run import RunSpec
from infra.keys import canonical_json
from infra.results.store import ResultsStore
from infra.tracking.tracker import Tracker


def recorded_result(spec: RunSpec) -> RunResult | None:
    """The result of such a run, without a flow run: of a night whose cells are all cached that is most of the time.

    None if anything is missing, or the run was recorded from a spec with other words. Raises SourceMissing and what the
    stores raise if they cannot be read.
    """
    run_context = open_run_context(spec)
    graph = build_stages(spec, run_context.sources, run_context.settings.device)
    if not all(run_context.store.has(stage.ref) for stage in graph.stages):
        return None
    results, words = ResultsStore.of(run_context.settings), canonical_json(spec.model_dump(mode="json"))
    rows = [row for row in results.runs() if row.run_key == graph.run_key and row.status == "completed"]
    if not rows or canonical_json(json.loads(rows[-1].spec)) != words:
        return None
    if not Tracker(run_context.settings.tracking_uri).has(graph.run_key):
        return None
    last = ends(spec.derivations)
    return RunResult(
        run_key=graph.run_key,
        name=spec.name,
        stages=tuple(found(stage, run_context) for stage in graph.stages),
        metrics=results.metrics(graph.run_key),
        checkpoints={name: str(run_context.store.path(graph.checkpoints[name])) for name in last},
    )
