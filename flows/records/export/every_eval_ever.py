"""The figures of a checkpoint in the format of the Every Eval Ever collection (eval.schema.json, version 0.3.0)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from flows.records.export.evaluated import Evaluated, common, data_of, protocol_of
from flows.records.export.lm_eval_results import higher_is_better
from infra.results.rows import MetricRow

SCHEMA_VERSION = "0.3.0"
#: before the names of data sets that are on no hub
_OURS = "slimline/"
#: ids of the metrics that are shares of one
_SHARES = {
    "acc": "accuracy",
    "acc_norm": "accuracy_length_normalised",
    "exact_match": "exact_match",
    "agreement": "agreement",
}


def every_eval_ever(checkpoint: Evaluated, folder_name: str) -> dict[str, Any]:
    """The content of the file. folder_name: the checkpoint's name as it can stand in an id.

    A score is a finite number there: what is none is named in source_metadata, where nobody takes it for missing.
    """
    run, now = checkpoint.run, str(int(time.time()))
    model = _model(checkpoint, folder_name)
    finite = [row for row in checkpoint.metrics if math.isfinite(row.value)]
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"slimline/{model['id']}/{now}",
        "evaluation_timestamp": str(int(run.finished_at.timestamp())),
        "retrieved_timestamp": now,
        "source_metadata": {
            "source_name": f"slimline run {run.name}",
            "source_type": "evaluation_run",
            "source_organization_name": "not stated",
            "evaluator_relationship": "first_party" if _made_here(checkpoint) else "third_party",
            "additional_details": _strings({"run": run.run_key, "not_finite": _not_finite(checkpoint.metrics)}),
        },
        "eval_library": {
            "name": "slimline",
            "version": run.slimline_version,
            "additional_details": _strings(common(checkpoint.metrics, "versions") or {}),
        },
        "model_info": model,
        "evaluation_results": [_result(row) for row in finite],
    }


def file_name(checkpoint: Evaluated) -> PurePath:
    """Within the checkpoint's folder; the next export of the same run takes its place."""
    return PurePath(f"{checkpoint.run.run_key}.json")


def _made_here(checkpoint: Evaluated) -> bool:
    return checkpoint.row is not None and checkpoint.row.action != "import"


def _model(checkpoint: Evaluated, folder_name: str) -> dict[str, Any]:
    row, versions = checkpoint.row, common(checkpoint.metrics, "versions") or {}
    original = row.model if row is not None and not _made_here(checkpoint) else None
    details = {"deployment_type": "self_deployed", "model_availability": "unknown"}
    details |= checkpoint.made_by | {"dtype": common(checkpoint.metrics, "dtype")}
    return {
        "name": original or checkpoint.name,
        "id": original or f"slimline/{folder_name}",
        "inference_engine": {"name": "transformers", "version": str(versions.get("transformers", "unknown"))},
        "additional_details": _strings(details),
    }


def _result(row: MetricRow) -> dict[str, Any]:
    details: dict[str, Any] = {"score": row.value}
    uncertainty: dict[str, Any] = {} if row.num_examples is None else {"num_samples": row.num_examples}
    if row.stderr is not None and math.isfinite(row.stderr):
        uncertainty["standard_error"] = {"value": row.stderr}
    if uncertainty:
        details["uncertainty"] = uncertainty
    asked = {"num_fewshot": row.num_fewshot, "protocol": json.dumps(protocol_of(row), sort_keys=True)}
    return {
        "evaluation_result_id": f"{row.suite}/{row.task}/{row.metric}",
        "evaluation_name": row.task,
        "source_data": _source(row),
        "metric_config": _metric(row),
        "score_details": details,
        "generation_config": {"additional_details": _strings(asked)},
    }


def _source(row: MetricRow) -> dict[str, Any]:
    data, protocol = data_of(row), protocol_of(row)
    if data is None or str(data.get("repo_id", _OURS)).startswith(_OURS):
        return {"dataset_name": row.task, "source_type": "other"}
    split = {"hf_split": protocol["split"]} if isinstance(protocol.get("split"), str) else {}
    content = _strings({"content": data.get("content"), "config": protocol.get("config")})
    return {
        "dataset_name": row.task,
        "source_type": "hf_dataset",
        "hf_repo": str(data["repo_id"]),
        **split,
        "additional_details": content,
    }


def _metric(row: MetricRow) -> dict[str, Any]:
    name, _, filtered = row.metric.partition(",")
    kind = _SHARES.get(name)
    found: dict[str, Any] = {
        "evaluation_description": f"{row.metric} of {row.task}",
        "metric_id": kind or f"slimline.{name}",
        "metric_name": row.metric,
        "lower_is_better": not higher_is_better(row),
        "score_type": "continuous",
        "min_score": 0.0 if kind else None,
        "max_score": 1.0 if kind else None,
    }
    if kind:
        found |= {"metric_kind": kind, "metric_unit": "proportion"}
    if name.startswith("ppl@"):
        found |= {"metric_id": "perplexity", "metric_kind": "perplexity", "min_score": 1.0, "max_score": "Infinity"}
        found["metric_parameters"] = {"window": int(name.partition("@")[2])}
    if filtered:
        found["additional_details"] = {"filter": filtered}
    return found


def _not_finite(rows: Iterable[MetricRow]) -> str | None:
    return ", ".join(f"{r.suite}/{r.task}/{r.metric} {r.value}" for r in rows if not math.isfinite(r.value)) or None


def _strings(values: dict[str, Any]) -> dict[str, str]:
    """What is known, as the format wants it: strings only."""
    return {key: str(value) for key, value in values.items() if value is not None}
