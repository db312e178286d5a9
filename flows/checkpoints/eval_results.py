"""The figures of a checkpoint as the hub takes them from a model's repository: `.eval_results/<task>.yaml`
(huggingface.co/docs/hub/eval-results)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import yaml

from flows.checkpoints.public import public, repository
from flows.records.export.evaluated import Evaluated, data_of, protocol_of
from flows.records.export.write import safe_name
from infra.results.rows import MetricRow

#: how a figure was taken, as far as it fits into a note
_NOTED = ("num_fewshot", "limit", "window", "max_windows", "bos", "split", "chat_template", "dtype")


def eval_results(checkpoint: Evaluated) -> Mapping[str, str]:
    """Text of each file by its name: a file per task whose data set the hub knows, with every finite figure of it."""
    files: dict[str, str] = {}
    for task, rows in checkpoint.tasks().items():
        data = data_of(rows[0]) or {}
        dataset = repository(str(data.get("repo_id", "")))
        finite = [row for row in rows if math.isfinite(row.value)]
        if dataset is not None and finite:
            entries = [_entry(checkpoint, dataset, data, task, row) for row in finite]
            files[f".eval_results/{safe_name(task)}.yaml"] = yaml.safe_dump(entries, sort_keys=False)
    return files


def _entry(
    checkpoint: Evaluated, dataset: str, data: Mapping[str, str], task: str, row: MetricRow
) -> dict[str, object]:
    place: dict[str, str] = {"id": dataset, "task_id": task}
    if "revision" in data:
        place["revision"] = data["revision"]
    return {
        "dataset": place,
        "value": row.value,
        "date": checkpoint.run.finished_at.isoformat(timespec="seconds"),
        "notes": public(_notes(row)),
    }


def _notes(row: MetricRow) -> str:
    """The metric, its standard error, and the parts of the protocol that decide about it most."""
    protocol = protocol_of(row) | {"num_fewshot": row.num_fewshot}
    said = [f"{name} {json.dumps(protocol[name])}" for name in _NOTED if protocol.get(name) is not None]
    error = [] if row.stderr is None or not math.isfinite(row.stderr) else [f"standard error {row.stderr:.4g}"]
    items = [] if row.num_examples is None else [f"{row.num_examples} items"]
    return "; ".join([row.metric, *error, *items, *said, "measured by slimline"])
