"""Part `lm_eval`: the `lm_eval` command run by hand on saved checkpoints, dense and pruned, against our suites.

The command knows nothing of this project: it loads a checkpoint with transformers alone, and its stock tasks from task
files that name nothing but the folder of the data.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from evaluation.harness.local_dataset import LocalFolder
from evaluation.harness.stock_tasks import StockTask, mmlu_tasks, stock_task
from evaluation.report import Metric
from evaluation.suite import SuiteConfig
from evaluation.suites import longbench, mmlu, zero_shot
from infra.models.import_model import load_tokenizer
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.methods import slimgpt
from tests.bench.materials import Materials
from tests.bench.options import Options, Windows
from tests.bench.report import Figures, Result, protocol
from tests.bench.resident import prune
from tests.bench.timing import bar, log

_CALIBRATION = Windows(8, 256)
_SPARSITY = 0.2
_MMLU, _LONGBENCH = "mmlu_", "longbench_"


@dataclass(frozen=True)
class Comparison:
    """Tasks that one call of either side scores, and what the command is told beside their names."""

    suite: ModuleType
    config: SuiteConfig
    tasks: tuple[StockTask, ...]
    num_fewshot: int
    batch_size: int


def comparisons(names: Sequence[str], limit: int) -> Iterator[Comparison]:
    """By suite: "mmlu_<subject>" five-shot, "longbench_<task>" cut on the left as lm-eval does, others zero-shot."""
    subjects = tuple(name.removeprefix(_MMLU) for name in names if name.startswith(_MMLU))
    longer = tuple(name for name in names if name.startswith(_LONGBENCH))
    others = tuple(name for name in names if not name.startswith((_MMLU, _LONGBENCH)))
    if others:
        tasks = tuple(stock_task(name) for name in others)
        yield Comparison(zero_shot, zero_shot.Config(tasks=others, limit=limit), tasks, 0, 8)
    if subjects:
        tasks = tuple(task for task in mmlu_tasks() if task.config in subjects)
        yield Comparison(mmlu, mmlu.Config(subjects=subjects, limit=limit), tasks, 5, 4)
    if longer:
        tasks = tuple(stock_task(name) for name in longer)
        # lm-eval pads the prompts of a batch; alone each is read as it is
        yield Comparison(longbench, longbench.Config(tasks=longer, truncation="left", limit=limit), tasks, 0, 1)


def run(materials: Materials, options: Options) -> Result:
    """The largest difference of any value over all tasks of both checkpoints, and of any standard error."""
    chosen = tuple(comparisons(options.lm_eval_tasks, options.lm_eval_limit))
    for comparison in chosen:
        comparison.suite.check(comparison.config)
    figures: Figures = {"lm_eval_tasks": len(options.lm_eval_tasks), "lm_eval_values": 0}
    worst = {"value": (0.0, ""), "stderr": (0.0, "")}
    for kind, folder in (("dense", materials.model_folder), ("pruned", _pruned(materials, options))):
        for comparison in chosen:
            ours = _ours(materials, options, folder, comparison)
            with bar(f"lm_eval on the {kind} model: {', '.join(task.name for task in comparison.tasks)}"):
                theirs = by_hand(materials, options, folder, comparison)
            for metric in ours:
                other = _by_hand_value(theirs, metric, "value")
                log.info("%s %s %s: %r, by hand %r", kind, metric.task, metric.metric, metric.value, other)
            figures["lm_eval_values"] = int(figures["lm_eval_values"]) + len(ours)
            for field, (most, _) in worst.items():
                difference, where = largest(ours, theirs, field)
                worst[field] = max((most, worst[field][1]), (difference, f"{kind} {where}"))
    figures |= {"lm_eval_max_difference": worst["value"][0], "lm_eval_max_stderr_difference": worst["stderr"][0]}
    if any(difference for difference, _ in worst.values()):
        figures["lm_eval_largest_at"] = "; ".join(where for difference, where in worst.values() if difference)
    how = protocol(
        options,
        f"{materials.model_name} and the same pruned ({options.pruned.name if options.pruned else _recipe()})",
        f"{', '.join(options.lm_eval_tasks)}, the first {options.lm_eval_limit} documents of each; mmlu five-shot, "
        "longbench cut on the left, no chat template",
        "by hand: python -m lm_eval run --model hf in a process of its own",
        batches="by hand batches of 8 (mmlu 4, longbench 1), ours of the suite's own size",
    )
    return Result("lm_eval", how, figures)


def by_hand(materials: Materials, options: Options, folder: Path, comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The command's results by task."""
    place = options.scratch / "lm-eval" / f"{folder.name}-{comparison.suite.__name__.rpartition('.')[2]}"
    write_task_files(materials, place / "tasks", comparison)
    device = options.device
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder.absolute()},dtype=float32,trust_remote_code=True"]
    command += ["--tasks", ",".join(task.name for task in comparison.tasks), "--device", device]
    command += ["--include_path", str(place / "tasks"), "--output_path", str(place / "results")]
    command += ["--limit", str(options.lm_eval_limit), "--num_fewshot", str(comparison.num_fewshot)]
    command += ["--batch_size", str(comparison.batch_size)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (place / "lm_eval.log").open("wb") as told:
        done = subprocess.run(command, env=environment, stdout=told, stderr=told, cwd=place, check=False)
    if done.returncode:
        raise RuntimeError(f"lm_eval ended with {done.returncode}: {(place / 'lm_eval.log').read_text()[-2000:]}")
    (written,) = (place / "results").rglob("results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(written.read_bytes())["results"]
    return results


def write_task_files(materials: Materials, place: Path, comparison: Comparison) -> None:
    """One file for each task that includes lm-eval's and names the data's folder."""
    place.mkdir(parents=True)
    for task in comparison.tasks:
        folder = materials.data_folder(task.repo_id)
        settings: dict[str, Any] = {"include": str(task.path)}
        if folder is not None:
            settings["dataset_path"] = str(folder.absolute())
            settings["dataset_kwargs"] = {"cache_dir": str(place.parent / "datasets")}
            named = task.settings.get("training_split")
            # HellaSwag's folder may lack the split that lm-eval would draw examples from, if it drew any
            if named and named not in LocalFolder(folder).splits(task.config) and not comparison.num_fewshot:
                settings["training_split"] = None
        (place / f"{task.name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def largest(ours: Sequence[Metric], theirs: dict[str, dict[str, Any]], field: str) -> tuple[float, str]:
    """The largest difference of values or of standard errors, and where it is; infinity where one side has none."""
    found = [(0.0, "")]
    for metric in ours:
        mine, other = getattr(metric, field), _by_hand_value(theirs, metric, field)
        both = mine is not None and other is not None
        difference = abs(mine - other) if both else (0.0 if mine is other else math.inf)
        found.append((difference, f"{metric.task} {metric.metric}"))
    return max(found)


def _by_hand_value(theirs: dict[str, dict[str, Any]], metric: Metric, field: str) -> float | None:
    """None where lm-eval has no such figure, which it writes as N/A."""
    name, _, filtered = metric.metric.partition(",")
    suffix = "_stderr" if field == "stderr" else ""
    value = theirs.get(metric.task, {}).get(f"{name}{suffix},{filtered or 'none'}")
    return None if value in (None, "N/A") else float(value)


def _ours(materials: Materials, options: Options, folder: Path, comparison: Comparison) -> list[Metric]:
    """The suite's rows of single tasks; averages of several are not the command's."""
    names = {task.name for task in comparison.tasks}
    model = load_checkpoint(folder, dtype=torch.float32).to(options.device)
    title = f"{comparison.suite.__name__.rpartition('.')[2]} on {folder.name}"
    result, _ = materials.evaluate(comparison.suite, model, load_tokenizer(folder), comparison.config, title)
    return [metric for metric in result.report.metrics if metric.task in names]


def _pruned(materials: Materials, options: Options) -> Path:
    """The folder of --pruned, or a checkpoint that is pruned here and saved as the product saves it."""
    if options.pruned is not None:
        return options.pruned
    texts, model = materials.tokens_only, materials.model()
    calibration = materials.calibration(texts, _CALIBRATION, num_heldout=2)
    pruning = prune(model, calibration, slimgpt.Config(sparsity=_SPARSITY), options, f"prune by {_SPARSITY:.0%}")
    folder = options.scratch / "pruned"
    save_checkpoint(pruning.smaller(model), materials.tokenizer, folder)
    return folder


def _recipe() -> str:
    return f"slimgpt, {_SPARSITY:.0%}, calibrated on {_CALIBRATION} tokens"
