"""The rows of the results store: the fields of a class are the columns of its table, in order.

Files and index are made from these classes alone: who adds a field gives it a default and counts `FORMAT` up. Imports
neither pyarrow nor duckdb.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict

FORMAT = 6
"""Version of the rows, in files and in the index. An index of another version is made anew from the files."""

DENSE = "dense"
"""Name of a run's checkpoint before any step: what the others are compared with."""


def _json_text(text: str) -> str:
    json.loads(text)
    return text


def _in_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


JsonText = Annotated[str, AfterValidator(_json_text)]
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class Row(BaseModel):
    """What every row has in common. In JSON infinity (the ppl of a broken model) is a word."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class OfRun(Row):
    """A row about a run: the key of that run."""

    run_key: str


class OfNight(Row):
    """A row about a night: the id of that night."""

    night_id: str


class RunRow(OfRun):
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


class StageRow(OfRun):
    """One stage of a run; `stage_key` names its folder in the artifact store. `seconds` is None if it did not run."""

    name: str
    stage_key: str
    kind: str
    status: Literal["completed", "cached", "failed", "skipped"]
    seconds: float | None = None
    message: str | None = None


class CheckpointRow(OfRun):
    """One finished checkpoint of a run and the way to it: `plugin` made it from `source`, or it was imported.

    `sparsity` is the share of its source's decoder that the step was asked to remove, `total_sparsity` that of the
    dense one which all steps on the way were; both are None where a number of layers was asked for, and neither counts
    a smaller vocabulary. `method` and
    `recovery` are the names of the steps on the way, in their order, joined by "+", None if there were none. `config`
    has every option on the way by its path, "model.id", "steps.0.sparsity" or "steps.0.calibration.num_samples".
    """

    checkpoint: str
    checkpoint_key: str
    source: str | None = None
    source_key: str | None = None
    action: Literal["import", "prune", "recover"]
    plugin: str | None = None
    variant: str | None = None
    sparsity: float | None = None
    total_sparsity: float | None = None
    model: str
    method: str | None = None
    recovery: str | None = None
    config: JsonText
    num_parameters: int | None = None
    """Tied embeddings count once. None, like the next, in rows of format 5 and before."""
    num_decoder_parameters: int | None = None


class MetricRow(OfRun):
    """One number about one checkpoint of a run, or about a file exported from one: then `checkpoint` is
    <checkpoint>+<type> and `checkpoint_key` the file's. `protocol` (JSON) says how it was measured."""

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
    higher_is_better: bool | None = None
    """None in rows that an older slimline (before schema 2) recorded."""


class PairRow(OfRun):
    """One figure of a checkpoint beside that of the `reference` checkpoint, on the same items.

    The difference value - reference_value lies within [low, high] at 95 % confidence; `p_value` is of this test alone.
    Flips (None for scores that are not right or wrong): items that the reference had right and the checkpoint has
    wrong, and the other way round.
    """

    checkpoint: str
    reference: str
    suite: str
    task: str
    metric: str
    value: float
    reference_value: float
    difference: float
    low: float
    high: float
    p_value: float
    test: Literal["mcnemar", "sign_flip"]
    num_items: int
    flips_lost: int | None = None
    flips_gained: int | None = None
    higher_is_better: bool
    stage_key: str
    reference_stage_key: str


class LayerRow(OfRun):
    """What pruning did to one half of one layer: `sparsity` is the share removed, errors are relative to its output.
    `score`: what went, in the method's own unit; None in rows of format 3 and before, and of methods without."""

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
    score: float | None = None


class CurveRow(OfRun):
    """One point of the training or the search that made a checkpoint; `step` counts optimizer steps or candidates."""

    stage_key: str
    metric: str
    step: int
    value: float


class NightRow(OfNight):
    """One night: all cells of a matrix of runs. `spec` is its full JSON with defaults; a key counts as one stage."""

    name: str
    spec: JsonText
    status: Literal["completed", "failed"]
    gates_passed: bool
    started_at: Moment
    finished_at: Moment
    prefect_run_id: str | None = None
    mlflow_run_id: str | None = None
    slimline_version: str
    git_revision: str | None = None
    previous_night_id: str | None = None
    num_stages: int
    num_run: int
    num_cached: int
    num_failed: int
    message: str | None = None


class NightCellRow(OfNight):
    """One cell of a night; `run_key` is None if its run could not be planned, `seconds` is its wall time."""

    cell: str
    run_key: str | None = None
    status: Literal["completed", "failed"]
    seconds: float
    num_run: int
    num_cached: int
    num_failed: int
    num_skipped: int
    message: str | None = None


class NightFigureRow(OfNight):
    """One figure of a night beside that of the last good night; `p_value` says how likely chance alone is."""

    cell: str
    checkpoint: str
    suite: str
    task: str
    metric: str
    value: float
    stderr: float | None = None
    num_examples: int | None = None
    higher_is_better: bool
    stage_key: str
    before_value: float | None = None
    before_stderr: float | None = None
    before_stage_key: str | None = None
    p_value: float | None = None
    test: Literal["z", "mcnemar", "sign_flip"] | None = None
    """None in rows of before format 3, where it was always z."""
    verdict: Literal["first", "same", "better", "worse", "noise", "gone"]
    gate: Literal["passed", "failed"] | None = None
    message: str | None = None


@dataclass(frozen=True)
class Kind:
    """What is recorded as a whole: rows of some tables that share a key. The first table has exactly one of them."""

    name: str
    key: str
    tables: Mapping[str, type[Row]]

    @property
    def head(self) -> str:
        """The table with the one row; also the name of the folder of the files."""
        return next(iter(self.tables))


RUN = Kind(
    "run",
    "run_key",
    {
        "runs": RunRow,
        "stages": StageRow,
        "metrics": MetricRow,
        "layers": LayerRow,
        "pairs": PairRow,
        "curves": CurveRow,
        "checkpoints": CheckpointRow,
    },
)
NIGHT = Kind("night", "night_id", {"nights": NightRow, "night_cells": NightCellRow, "night_figures": NightFigureRow})
KINDS = (RUN, NIGHT)
TABLES: dict[str, type[Row]] = {**RUN.tables, **NIGHT.tables}

ColumnType = Literal["text", "json", "integer", "number", "flag", "moment"]
_TYPES: dict[object, ColumnType] = {str: "text", int: "integer", float: "number", bool: "flag", AwareDatetime: "moment"}


@dataclass(frozen=True)
class Column:
    """What a column holds, and whether it may be NULL."""

    type: ColumnType
    nullable: bool


def columns(row: type[Row]) -> dict[str, Column]:
    """The columns of a table, in order."""
    found = {}
    for name, field in row.model_fields.items():
        options = [option for option in get_args(field.annotation) or (field.annotation,) if option is not NoneType]
        is_json = any(isinstance(mark, AfterValidator) and mark.func is _json_text for mark in field.metadata)
        if get_origin(field.annotation) is Literal or get_origin(options[0]) is Literal:
            options = [str]
        found[name] = Column("json" if is_json else _TYPES[options[0]], not field.is_required())
    return found
