"""The view of all checkpoints in one table, which MLflow's page of the experiment offers under "Views": which runs it
shows and in which columns. A view is a tag of the experiment, as MLflow's pages 3.17 write it. Imports no mlflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from infra.tracking import mlflow_rules as rules

KEY = "slimline-checkpoints"
TAG = f"mlflow.sharedViewState.{KEY}"
FILTER = "tags.\"slimline.kind\" = 'checkpoint'"

_NAME = "Checkpoints"
_PARAMS = ("method", "sparsity", "recovery", "model")
#: more columns than a screen has room for; MLflow's tag of an experiment has 5000 characters
_MOST_METRICS = 12
_MOST_CHARACTERS = 5000
#: of a column, in pixels, so that its name can be read
_WIDEST = 300


def address(experiment_id: str) -> str:
    """Of the view, within MLflow's pages."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}&workflowType=machine_learning"


def comparison(experiment_id: str, run_ids: Sequence[str]) -> str:
    """The address of the page that compares runs, within MLflow's pages."""
    runs = "%2C".join(f"%22{run_id}%22" for run_id in run_ids)
    experiment = f"experiments=%5B%22{experiment_id}%22%5D"
    return f"#/compare-runs?runs=%5B{runs}%5D&{experiment}&workflowType=machine_learning"


def widened(known: str | None, metrics: Sequence[str], now_ms: int) -> str | None:
    """The view with columns for these metrics, those that it has before them; None if nothing is new in it.

    known: the view as it is; one that a user saved anew is theirs and stays as it is.
    """
    view = _read(known)
    if view is None:
        return None
    columns = [*view["columns"], *(_column("metrics", next(iter(rules.accepted_keys({m: m})))) for m in metrics)]
    columns = list(dict.fromkeys(columns))[: max(len(_PARAMS) + _MOST_METRICS, len(view["columns"]))]
    if columns == view["columns"]:
        return None
    at = view["at"] or now_ms
    text = json.dumps({"name": _NAME, "createdAt": at, "updatedAt": at, "state": json.dumps(_state(columns))})
    return text if len(text) <= _MOST_CHARACTERS else None


def _state(columns: Sequence[str]) -> dict[str, Any]:
    """The best of the first figure stand first. Ordered by when they were made, MLflow hides checkpoints below their
    runs."""
    figures = [column for column in columns if column.startswith("metrics.")]
    return {
        "searchFilter": FILTER,
        "orderByKey": figures[0] if figures else "attributes.run_name",
        "orderByAsc": not figures or "/ppl" in figures[0],
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {column: min(_WIDEST, 8 * len(column) - 20) for column in figures},
    }


def _read(known: str | None) -> dict[str, Any] | None:
    """Its columns, and when it was made; None if it is not ours."""
    if known is None:
        return {"columns": [_column("params", name) for name in _PARAMS], "at": None}
    try:
        view = json.loads(known)
        columns = json.loads(view["state"])["selectedColumns"]
        return {"columns": list(columns), "at": view["createdAt"]} if view["createdAt"] == view["updatedAt"] else None
    except (ValueError, KeyError, TypeError):
        return None  # compressed, or of another MLflow


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"
