"""Which splits a local data folder offers, by the rules of the hub: its README's `configs`, else its file names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from evaluation.errors import EvaluationError
from evaluation.stock_tasks import StockTask
from evaluation.task_yaml import load_yaml

_SPLIT_FILE = re.compile(r"^(?P<split>\w+?)(-\d{5}-of-\d{5})?\.(parquet|jsonl?|csv|arrow|txt)(\.gz|\.zst)?$")


@dataclass(frozen=True)
class LocalFolder:
    """A folder that stands for a data set of the hub. Its README is read once: MMLU asks 57 times."""

    path: Path

    def require(self, task: StockTask, splits: list[str]) -> None:
        """Raise EvaluationError, naming task, data set and folder, unless all these splits of its data are there."""
        wanted = task.repo_id + (f" ({task.config})" if task.config else "")
        if not self.path.is_dir():
            raise EvaluationError(
                f"task '{task.name}' reads {wanted}, but there is no folder {self.path}; "
                "put the data set there or let the hub be used"
            )
        if self._configs and self._chosen(task.config) is None:
            raise EvaluationError(
                f"task '{task.name}' reads {wanted}, but {self.path} has only the configurations "
                + ", ".join(sorted(self._configs))
            )
        present = self.splits(task.config)
        missing = [split for split in splits if split not in present]
        if missing:
            have = ", ".join(sorted(present)) or "none"
            raise EvaluationError(
                f"task '{task.name}' reads the split '{missing[0]}' of {wanted}, "
                f"but of its splits {self.path} has {have}"
            )

    def splits(self, config: str | None) -> frozenset[str]:
        """The splits of a configuration (None: the default one) whose files exist; empty if it does not exist."""
        if not self._configs:
            return self._by_file_name(config)
        return self._existing((self._chosen(config) or {}).get("data_files"))

    def write_excerpt(self, place: Path, config: str | None, splits: Sequence[str]) -> Path:
        """A folder at `place` that offers these splits of one configuration, their files read where they lie.

        `datasets` reads a whole README, slowly, each time it loads one of its configurations, and prepares all splits
        of that; MMLU has 57 configurations. Gives the folder itself back where no README lists its files.
        """
        entry = self._chosen(config)
        if entry is None:
            return self.path
        listed = {name: patterns for name, patterns in _listed(entry.get("data_files")).items() if name in splits}
        files = [
            {"split": name, "path": [str(self.path.resolve() / pattern) for pattern in patterns]}
            for name, patterns in listed.items()
        ]
        header: dict[str, Any] = {"configs": [entry | {"data_files": files}]}
        if features := self._features(str(entry["config_name"])):
            header["dataset_info"] = [{"config_name": entry["config_name"], "features": features}]
        place.mkdir(parents=True)
        (place / "README.md").write_text(f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n", encoding="utf-8")
        return place

    def _features(self, config: str) -> Any:
        """The columns' types as the README states them, None if it does not."""
        infos = self._header.get("dataset_info") or []
        for info in [infos] if isinstance(infos, dict) else infos:
            if str(info.get("config_name", config)) == config:
                return info.get("features")
        return None

    @cached_property
    def _header(self) -> dict[str, Any]:
        readme = self.path / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        parts = text.split("---\n", 2)
        header = load_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        return header if isinstance(header, dict) else {}

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {str(entry["config_name"]): entry for entry in self._header.get("configs") or []}

    def _chosen(self, config: str | None) -> dict[str, Any] | None:
        if config is not None:
            return self._configs.get(config)
        if len(self._configs) == 1:
            return next(iter(self._configs.values()))
        marked = [entry for entry in self._configs.values() if entry.get("default")]
        return marked[0] if marked else self._configs.get("default")

    def _existing(self, data_files: Any) -> frozenset[str]:
        """A README may promise files that were never copied."""
        listed = _listed(data_files)
        return frozenset(
            name for name, patterns in listed.items() if any(next(self.path.glob(each), None) for each in patterns)
        )

    def _by_file_name(self, config: str | None) -> frozenset[str]:
        places = [self.path / (config or "data"), self.path / "data", self.path]
        place = next(place for place in places if place.is_dir())
        matches = (_SPLIT_FILE.match(path.name) for path in place.iterdir() if path.is_file())
        return frozenset(match["split"] for match in matches if match)


def _listed(data_files: Any) -> dict[str, list[str]]:
    """Patterns by split of a README's `data_files`; files without a split are "train"."""
    if isinstance(data_files, str) or (data_files and isinstance(data_files[0], str)):
        data_files = [{"split": "train", "path": data_files}]
    listed: dict[str, list[str]] = {}
    for entry in data_files or []:
        patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
        listed.setdefault(str(entry["split"]), []).extend(patterns)
    return listed
