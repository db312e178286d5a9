"""The tasks that lm-eval ships, read from its YAML files without importing it (importing and indexing it cost 13 s).

Only these files say which data a task reads and whether a name exists; nothing of a task is repeated in this project.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from evaluation.errors import EvaluationError
from evaluation.naming import did_you_mean
from evaluation.suite import DataNeed

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven zero-shot tasks of LLM-Pruner, Shortened LLaMA and SlimGPT."""

# Where the tasks of every ordinary run live, so that a run need not look through lm-eval's 14,000 files.
_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
_MMLU_FOLDER = "mmlu/default"
_LONGBENCH_PREFIX = "longbench_"

_NAME = re.compile(rb"""^["']?(group|task)["']?:[ \t]*["']?([\w.:/+-]+)""", re.MULTILINE)


@dataclass(frozen=True)
class StockTask:
    """One task or group as lm-eval defines it: its file, and the settings with every `include:` followed."""

    name: str
    path: Path
    settings: dict[str, Any]

    @property
    def is_group(self) -> bool:
        """A group only averages other tasks."""
        return "group" in self.settings

    @property
    def repo_id(self) -> str:
        """The data set's id on the hub."""
        return str(self.settings["dataset_path"])

    @property
    def config(self) -> str | None:
        """The data set's configuration, None for its default one."""
        name = self.settings.get("dataset_name")
        return None if name is None else str(name)

    @property
    def eval_split(self) -> str:
        """The split that is scored: lm-eval prefers test to validation."""
        return str(self.settings.get("test_split") or self.settings["validation_split"])

    @property
    def fewshot_split(self) -> str | None:
        """The split that few-shot examples are drawn from, None if they are written in the task itself."""
        fewshot: dict[str, Any] = self.settings.get("fewshot_config") or {}
        if fewshot.get("samples"):
            return None
        keys = ("fewshot_split", "training_split", "validation_split", "test_split")
        named = [fewshot.get("split"), *(self.settings.get(key) for key in keys)]
        return next((str(split) for split in named if split), None)

    def needs(self, num_fewshot: int) -> tuple[DataNeed, ...]:
        """The splits read with so many few-shot examples."""
        splits = [self.eval_split, *([self.fewshot_split] if num_fewshot and self.fewshot_split else [])]
        return tuple(DataNeed(repo_id=self.repo_id, config=self.config, split=s) for s in dict.fromkeys(splits))


def stock_task(name: str) -> StockTask:
    """The leaf task of that name.

    Raises EvaluationError for an unknown name (naming near ones), for a group, and for tasks that cannot be run here:
    those that run code a model wrote, and those that load their data in Python and so cannot be given a local folder.
    """
    path = _path_of(name)
    task = StockTask(name, path, _settings(path))
    if task.is_group:
        raise EvaluationError(f"'{name}' is a group of lm-eval tasks; name the tasks you want from it")
    if task.settings.get("unsafe_code"):
        raise EvaluationError(f"task '{name}' executes code that a model wrote, which is not done here; leave it out")
    if "class" in task.settings or "custom_dataset" in task.settings or "dataset_path" not in task.settings:
        raise EvaluationError(f"task '{name}' loads its data in Python code, not from a data set; leave it out")
    if not (task.settings.get("test_split") or task.settings.get("validation_split")):
        raise EvaluationError(f"task '{name}' names neither a test nor a validation split to score; leave it out")
    return task


@lru_cache(maxsize=1)
def mmlu_tasks() -> tuple[StockTask, ...]:
    """MMLU's 57 subjects and its five groups (all, humanities, social sciences, STEM, other)."""
    paths = sorted((tasks_folder() / _MMLU_FOLDER).glob("*.yaml"))
    if not paths:
        raise EvaluationError(f"the installed lm-eval has no {_MMLU_FOLDER}; install lm-eval 0.4.13")
    read = [(path, _settings(path)) for path in paths]
    return tuple(StockTask(settings.get("group") or settings["task"], path, settings) for path, settings in read)


@lru_cache(maxsize=1)
def tasks_folder() -> Path:
    """lm-eval's folder of task definitions; EvaluationError if lm-eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError("lm-eval is not installed; pip install lm-eval")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@lru_cache(maxsize=1)
def _known() -> dict[str, Path]:
    """Every name that lm-eval's files define. A text scan, about 1 s: parsing them all as YAML costs 10 s."""
    paths = sorted(tasks_folder().rglob("*.yaml"), key=lambda path: path.as_posix())
    known: dict[str, Path] = {}
    for path in paths:
        names = dict(_NAME.findall(path.read_bytes()))
        name = names.get(b"group") or names.get(b"task")
        if name:
            known.setdefault(name.decode(), path)
    return known


def _path_of(name: str) -> Path:
    if name.startswith(_LONGBENCH_PREFIX):
        usual = f"longbench/{name.removeprefix(_LONGBENCH_PREFIX)}.yaml"
    else:
        usual = _FILES.get(name, "")
    if (tasks_folder() / usual).is_file():
        return tasks_folder() / usual
    known = _known()
    if name not in known:
        hint = did_you_mean(name, known) or "`lm_eval ls tasks` lists them"
        raise EvaluationError(f"lm-eval has no task '{name}'; {hint}")
    return known[name]


def _settings(path: Path) -> dict[str, Any]:
    """The file's settings over those of the files it includes; as lm-eval merges them, the file itself wins."""
    own: dict[str, Any] = load_yaml(path.read_bytes())
    included = own.pop("include", None) or []
    merged: dict[str, Any] = {}
    for other in [included] if isinstance(included, str) else included:
        merged |= _settings(path.parent / other)
    return merged | own


# libyaml reads MMLU's files in a tenth of the time; not every PyYAML is built with it
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In which `!function module.name` is just its text."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def load_yaml(text: str | bytes) -> Any:
    """YAML of lm-eval's tasks and of data sets' cards, read without running anything. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)
