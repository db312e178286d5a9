"""Local data for lm-eval's stock tasks: per task a small YAML file that `include:`s the stock file and names another
`dataset_path`. That is lm-eval's documented way to vary a task; prompts and metrics stay its own, and no global of
lm-eval or of `datasets` has to be replaced to decide what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from evaluation.harness.local_dataset import LocalFolder
from evaluation.harness.stock_tasks import StockTask
from evaluation.suite import SuiteData


def write_overlays(scratch: Path, tasks: Sequence[StockTask], data: SuiteData, *, num_fewshot: int) -> None:
    """Write one YAML file per task and group into `scratch`, which also gets the cache of the data.

    Raises EvaluationError if a local folder lacks the configuration or a split that a task reads, and what `data.check`
    raises for files that cannot be read.
    """
    leaves = [task for task in tasks if not task.is_group]
    paths = {repo_id: data.folder(repo_id) for repo_id in dict.fromkeys(task.repo_id for task in leaves)}
    folders = {repo_id: LocalFolder(path) for repo_id, path in paths.items() if path is not None}
    for number, task in enumerate(tasks):
        overlay: dict[str, Any] = {"include": str(task.path)}
        if not task.is_group:
            overlay |= _data_settings(task, folders.get(task.repo_id), num_fewshot, scratch, data)
        (scratch / f"{number}.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")


def _data_settings(
    task: StockTask, folder: LocalFolder | None, num_fewshot: int, scratch: Path, data: SuiteData
) -> dict[str, Any]:
    # lm-eval builds its pool of few-shot examples even when none is asked for. Then the scored split will do as the
    # pool: it is never drawn from, and a folder without the training split (HellaSwag's often) serves as well.
    settings: dict[str, Any] = {} if num_fewshot else {"fewshot_split": task.eval_split}
    if folder is None:
        return settings
    splits = [need.split for need in task.needs(num_fewshot)]
    folder.require(task, splits)
    given = task.settings.get("dataset_kwargs") or {}
    # A task that names files itself (C4) names them inside the folder.
    named = "data_files" in given or "data_dir" in given
    read = folder.path if named else folder.write_excerpt(scratch / "data" / task.name, task.config, splits)
    if not named:
        data.check(task.repo_id, read, task.config, splits)
    # `datasets` keys its cache of a local folder on the README, not on the files: edited data would be served stale.
    kwargs = given | {"cache_dir": str(scratch / "datasets")}
    return settings | {"dataset_path": str(read.resolve()), "dataset_kwargs": kwargs}
