"""The figures of a checkpoint as lm-eval 0.4.13 writes its results_*.json, for what reads those.

Perplexity windows are no task of lm-eval; they stand there as tasks all the same, with their protocol in the metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from flows.records.export.evaluated import Evaluated, common, data_of, protocol_of
from infra.results.rows import MetricRow

#: what lm-eval writes where it has no standard error; its table prints nothing else there but numbers
_NONE = "N/A"


def lm_eval_results(checkpoint: Evaluated, folder_name: str) -> dict[str, Any]:
    """The content of the file. folder_name: of the folder that it lies in, lm-eval's sanitized name of the model."""
    tasks = checkpoint.tasks()
    versions = common(checkpoint.metrics, "versions") or {}
    return {
        "results": {name: _figures(name, rows) for name, rows in tasks.items()},
        "group_subtasks": {name: [] for name in tasks},
        "configs": {name: _config(name, rows) for name, rows in tasks.items()},
        "versions": {name: _version(rows[0].task_version) for name, rows in tasks.items() if rows[0].task_version},
        "n-shot": {name: rows[0].num_fewshot for name, rows in tasks.items() if rows[0].num_fewshot is not None},
        "higher_is_better": {name: {_base(row): higher_is_better(row) for row in rows} for name, rows in tasks.items()},
        "n-samples": {name: _counts(rows[0]) for name, rows in tasks.items()},
        "config": _run_config(checkpoint),
        "git_hash": checkpoint.run.git_revision,
        "date": checkpoint.run.started_at.timestamp(),
        "transformers_version": versions.get("transformers"),
        "lm_eval_version": versions.get("lm-eval"),
        "upper_git_hash": None,
        "task_hashes": {},
        "model_source": "hf",
        "model_name": checkpoint.name,
        "model_name_sanitized": folder_name,
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": common(checkpoint.metrics, "chat_template"),
        "chat_template_sha": None,
        "start_time": checkpoint.run.started_at.timestamp(),
        "end_time": checkpoint.run.finished_at.timestamp(),
        "total_evaluation_time_seconds": None,
        "slimline": checkpoint.made_by,
    }


def file_name(checkpoint: Evaluated) -> PurePath:
    """Within the model's folder; lm-eval knows the newest file by it."""
    return PurePath(f"results_{checkpoint.run.finished_at:%Y-%m-%dT%H-%M-%S.%f}.json")


def higher_is_better(row: MetricRow) -> bool:
    """Which way is up; rows of an older slimline do not say it."""
    return not row.metric.startswith("ppl") if row.higher_is_better is None else row.higher_is_better


def _figures(name: str, rows: Sequence[MetricRow]) -> dict[str, Any]:
    figures: dict[str, Any] = {"alias": name, "sample_len": rows[0].num_examples}
    for row in rows:
        _, _, filtered = row.metric.partition(",")
        figures[f"{_base(row)},{filtered or 'none'}"] = row.value
        known = row.stderr is not None and math.isfinite(row.stderr)
        figures[f"{_base(row)}_stderr,{filtered or 'none'}"] = row.stderr if known else _NONE
    return figures


def _config(name: str, rows: Sequence[MetricRow]) -> dict[str, Any]:
    first, protocol = rows[0], protocol_of(rows[0])
    config: dict[str, Any] = {"task": name}
    if data := data_of(first):
        config |= {"dataset_path": data.get("repo_id", "local data"), "dataset_name": protocol.get("config")}
        config |= {"test_split": protocol["split"]} if "split" in protocol else {}
    metrics = [{"metric": _base(row), "higher_is_better": higher_is_better(row)} for row in rows]
    config |= {"num_fewshot": first.num_fewshot, "metric_list": metrics}
    return config | {
        "metadata": {"version": _version(first.task_version), "suite": first.suite, "protocol": protocol},
    }


def _run_config(checkpoint: Evaluated) -> dict[str, Any]:
    metrics, row = checkpoint.metrics, checkpoint.row
    seeds: Mapping[str, Any] = common(metrics, "seeds") or {}
    return {
        "model": "hf",
        "model_args": {"pretrained": checkpoint.name},
        "model_num_parameters": row.num_parameters if row else None,
        "model_dtype": common(metrics, "dtype"),
        "model_revision": None,
        "model_sha": metrics[0].checkpoint_key,
        "batch_size": None,
        "batch_sizes": [],
        "device": None,
        "use_cache": None,
        "limit": common(metrics, "limit"),
        "bootstrap_iters": common(metrics, "bootstrap_iters"),
        "gen_kwargs": {},
        "random_seed": seeds.get("python"),
        "numpy_seed": seeds.get("numpy"),
        "torch_seed": seeds.get("torch"),
        "fewshot_seed": seeds.get("fewshot"),
    }


def _counts(row: MetricRow) -> dict[str, int | None]:
    """How many items there are is not known of those that were measured with a limit."""
    limited = protocol_of(row).get("limit") is not None or protocol_of(row).get("max_windows") is not None
    return {"original": None if limited else row.num_examples, "effective": row.num_examples}


def _base(row: MetricRow) -> str:
    """The metric's name without lm-eval's filter."""
    return row.metric.partition(",")[0]


def _version(version: str | None) -> float | str | None:
    """A number, as in lm-eval, if it is one."""
    try:
        return None if version is None else float(version)
    except ValueError:
        return version
