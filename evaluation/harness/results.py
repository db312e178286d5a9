"""lm-eval's results as this project's metrics and samples. Works on its dictionaries and imports nothing of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evaluation.errors import EvaluationError
from evaluation.report import Metric
from evaluation.samples import Sample

_PROMPT_CHARACTERS = 4000


def task_metrics(results: Mapping[str, Any]) -> tuple[Metric, ...]:
    """One metric per task, group and metric name of lm-eval's `results`. Raises EvaluationError for NaN."""
    metrics = []
    shots: dict[str, int] = results["n-shot"]
    # lm-eval gives a group of groups no n-shot of its own.
    common = next(iter(shots.values())) if len(set(shots.values())) == 1 else None
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr"):
                continue
            if math.isnan(value):
                raise EvaluationError(f"task '{task}' gives NaN for {name}: the model's logits are NaN; prune less")
            metrics.append(
                Metric(
                    task=task,
                    metric=_metric_name(name, filtered),
                    value=value,
                    stderr=_number(values.get(f"{name}_stderr,{filtered}")),
                    num_fewshot=shots.get(task, common),
                    num_examples=values["sample_len"],
                    task_version=_text(results["versions"].get(task)),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(name) is not False,
                )
            )
    return tuple(metrics)


def task_samples(tasks: Mapping[str, Any], logged: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Sample, ...]:
    """One sample per document of each task, in the order of the data.

    tasks: lm-eval's task objects by name. logged: its `samples`, one entry per document and filter. `prompt` is the end
    of the context (of the first choice, where the choices stand in the context). Of a multiple choice `response` is the
    choice that acc counts, not the length-normalised one. Metrics that are no number of a document (F1 over all of
    them, a perplexity per word) are left out of `scores`. Of lm-eval's `perplexity`, which is exp(-mean) over
    log-likelihoods, the scores are the negative ones, so that it is exp of their mean as every perplexity is.
    """
    return tuple(sample for name, entries in logged.items() for sample in _samples(name, tasks[name], entries))


def _samples(name: str, task: Any, entries: Sequence[Mapping[str, Any]]) -> Iterator[Sample]:
    documents: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        documents.setdefault(entry["doc_id"], []).append(entry)
    for item, filtered in sorted(documents.items()):
        first = filtered[0]
        target, response = _answers(task, first)
        yield Sample(
            task=name,
            item=item,
            item_hash=_hash(first["doc_hash"], first["prompt_hash"], first["target_hash"]),
            scores={key: value for entry in filtered for key, value in _scores(task, entry)},
            prompt=str(first["arguments"][0][0])[-_PROMPT_CHARACTERS:],
            target=target,
            response=response,
        )


def _scores(task: Any, entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for metric in entry["metrics"]:
        value = entry[metric]
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        yield _metric_name(metric, entry["filter"]), -number if _takes_log_likelihoods(task, metric) else number


def _takes_log_likelihoods(task: Any, metric: str) -> bool:
    """Whether the metric is lm-eval's aggregation `perplexity`: exp(-mean) of what the documents have."""
    aggregate = task.aggregation().get(metric)
    names = getattr(aggregate, "__module__", None), getattr(aggregate, "__name__", None)
    return names == ("lm_eval.api.metrics", "perplexity")


def _answers(task: Any, entry: Mapping[str, Any]) -> tuple[str, str | None]:
    """What was right and what the model gave."""
    if task.OUTPUT_TYPE == "multiple_choice":
        choices: list[str] = task.doc_to_choice(entry["doc"])
        # lm-eval's own rule: where the choices stand in the context, its text function gives the right one's number
        gold = task.doc_to_text(entry["doc"]) if task.multiple_input else entry["target"]
        # after the choices may come their unconditional likelihoods
        likelihoods = [answer[0] for answer in entry["filtered_resps"][: len(choices)]]
        return _chosen(choices, gold), choices[max(range(len(choices)), key=likelihoods.__getitem__)]
    response = entry["filtered_resps"][0]
    return str(entry["target"]), response if isinstance(response, str) else None


def _chosen(choices: Sequence[str], gold: Any) -> str:
    if isinstance(gold, list):
        return " | ".join(_chosen(choices, each) for each in gold)
    return choices[gold] if isinstance(gold, int) and gold < len(choices) else str(gold)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _metric_name(metric: str, filtered: str) -> str:
    """lm-eval's filter stands in the name only if one was applied."""
    return metric if filtered == "none" else f"{metric},{filtered}"


def _number(value: Any) -> float | None:
    """lm-eval writes 'N/A' where it has no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
