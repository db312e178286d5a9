"""The rows of the results file: the fields of a class are the columns of its table, in order. Imports no duckdb."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict


def _json_text(text: str) -> str:
    json.loads(text)
    return text


def _in_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


JsonText = Annotated[str, AfterValidator(_json_text)]
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class Row(BaseModel):
    """What every row has: the key of the run it belongs to. In JSON infinity (the ppl of a broken model) is a word."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    run_key: str


class RunRow(Row):
    """One run of a spec. `spec` is its full JSON with defaults."""

    name: str
    spec: JsonText
    status: Literal["completed", "failed"]
    started_at: Moment
    finished_at: Moment
    prefect_run_id: str | None = None
    mlflow_run_id: str | None = None
    slimline_version: str
    git_revision: str | None = None
    message: str | None = None


class StageRow(Row):
    """One stage of a run; `stage_key` names its folder in the artifact store. `seconds` is None if it did not run."""

    name: str
    stage_key: str
    kind: str
    status: Literal["completed", "cached", "failed", "skipped"]
    seconds: float | None = None
    message: str | None = None


class MetricRow(Row):
    """One number about one checkpoint of a run. `protocol` (JSON) says how it was measured."""

    checkpoint: str
    checkpoint_key: str
    stage_key: str
    suite: str
    task: str
    metric: str
    value: float
    stderr: float | None = None
    num_fewshot: int | None = None
    num_examples: int | None = None
    task_version: str | None = None
    protocol: JsonText


class LayerRow(Row):
    """What pruning did to one half of one layer: `sparsity` is the share removed, errors are relative to its output."""

    stage_key: str
    layer: int
    sub_layer: Literal["attention", "mlp"]
    kept: int
    total: int
    sparsity: float
    predicted_error: float | None = None
    measured_error: float | None = None
    heldout_error: float | None = None
    condition: float | None = None
    seconds: float | None = None
    num_tokens: int | None = None


TABLES: dict[str, type[Row]] = {"runs": RunRow, "stages": StageRow, "metrics": MetricRow, "layers": LayerRow}
