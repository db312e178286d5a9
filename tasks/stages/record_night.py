"""What a night came to, written to DuckDB and MLflow; a night that is retried replaces its own rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from infra.results.rows import NightCellRow, NightFigureRow, NightRow
from infra.results.store import ResultsStore
from infra.secrets import secrets_kept
from infra.settings import Settings
from infra.tracking.records import MetricPoint, RunContent, RunRecord
from infra.tracking.tracker import Tracker
from tasks.recording.run_record import visit_tags
from tasks.stages.record import tracked


@task(name="record-night", task_run_name="record", cache_policy=NO_CACHE, persist_result=False)
def record_night(
    night: NightRow, cells: Sequence[NightCellRow], figures: Sequence[NightFigureRow], summary: str, settings: Settings
) -> None:
    """Write the night. Raises ResultsUnusable, and TrackingUnusable after the rows are written."""
    with secrets_kept():
        run_id, problem = tracked(lambda: _track(night, cells, figures, summary, settings))
        ResultsStore.of(settings).record_night(night.model_copy(update={"mlflow_run_id": run_id}), cells, figures)
        if problem:
            raise problem


def _track(
    night: NightRow, cells: Sequence[NightCellRow], figures: Sequence[NightFigureRow], summary: str, settings: Settings
) -> str:
    """The run of the night, with those of its cells below it; a cell is shown below the last night that it was of."""
    spec: dict[str, Any] = json.loads(night.spec)
    counts = {name: float(getattr(night, name)) for name in ("num_stages", "num_run", "num_cached", "num_failed")}
    verdicts = {
        f"figures_{word}": float(sum(row.verdict == word for row in figures)) for word in ("better", "worse", "gone")
    }
    content = RunContent(
        name=night.name,
        status=night.status,
        params={word: ", ".join(map(str, given)) for word, given in (spec.get("matrix") or {}).items() if given},
        metrics=[MetricPoint(f"night/{name}", value) for name, value in (counts | verdicts).items()],
        tags={
            "slimline.kind": "night",
            "slimline.gates_passed": str(night.gates_passed).lower(),
            "slimline.previous_night": night.previous_night_id or "",
            **{f"cell.{cell.cell}": cell.run_key or cell.status for cell in cells},
        },
        artifacts={"summary.md": summary, "spec.json": json.dumps(spec, indent=1)},
        description=summary,
        began_ms=int(night.started_at.timestamp() * 1000),
        ended_ms=int(night.finished_at.timestamp() * 1000),
    )
    above = tuple(dict.fromkeys(cell.run_key for cell in cells if cell.run_key))
    return Tracker(settings.tracking_uri).record(
        RunRecord(night.night_id, content, above=above), visit_tags(night.prefect_run_id)
    )
