"""Which splits a local data folder offers, by the rules of `datasets`: its README's `configs`, else its files' names.

`datasets` must then read the same files, so names are resolved by its own functions. Import it late: `datasets` costs
two seconds.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from datasets.data_files import SPLIT_KEYWORDS, DataFilesList, get_data_patterns, resolve_pattern, sanitize_patterns
from datasets.load import infer_module_for_data_files_list
from datasets.packaged_modules import _ALL_ALLOWED_EXTENSIONS, _MODULE_TO_EXTENSIONS

from evaluation.errors import EvaluationError
from evaluation.harness.stock_tasks import StockTask, load_yaml

Files = dict[str, list[str]]
"""Absolute paths by split."""

_WORDS_OF_SPLITS = {word for words in SPLIT_KEYWORDS.values() for word in words}


@dataclass(frozen=True)
class LocalFolder:
    """A folder that stands for a data set of the hub. Its README is read once: MMLU asks 57 times.

    Without `configs` in a README a configuration is the subfolder of its name, or the whole folder if that holds no
    other configuration; its splits are those that `datasets` infers from the names in it. There `dev` is another word
    for validation, but lm-eval asks MMLU for "dev", and beside "validation" it is another split. So files named dev
    are offered as "dev" too, and belong to "validation" only where no others do.
    """

    path: Path

    def require(self, task: StockTask, splits: list[str]) -> None:
        """Raise EvaluationError, naming task, data set and folder, unless all these splits of its data are there."""
        wanted = task.repo_id + (f" ({task.config})" if task.config else "")
        if not self.path.is_dir():
            raise EvaluationError(
                f"task '{task.name}' reads {wanted}, but there is no folder {self._real}; "
                "put the data set there or let the hub be used"
            )
        if others := self._instead_of(task.config):
            raise EvaluationError(
                f"task '{task.name}' reads {wanted}, but {self._real} has only the configurations " + ", ".join(others)
            )
        present = self.splits(task.config)
        missing = [split for split in splits if split not in present]
        if missing:
            have = ", ".join(sorted(present)) or "none"
            raise EvaluationError(
                f"task '{task.name}' reads the split '{missing[0]}' of {wanted}, "
                f"but of its splits {self._real} has {have}"
            )

    def splits(self, config: str | None) -> frozenset[str]:
        """The splits of a configuration (None: the default one) whose files exist; empty if it does not exist.

        Raises EvaluationError if the README cannot be understood.
        """
        return frozenset(split for split, patterns in self._patterns(config).items() if _resolved(patterns))

    def write_excerpt(self, place: Path, config: str | None, splits: Sequence[str]) -> Path:
        """A folder at `place` whose README offers these splits of one configuration, their files read where they lie.

        `datasets` reads a whole README, slowly, each time it loads one of its configurations, and prepares all splits
        of that; MMLU has 57 configurations. Where no README names configurations, it would know only "default".
        """
        entry = self._chosen(config) or {"config_name": config or "default"}
        name = str(entry["config_name"])
        files = [{"split": split, "path": paths} for split, paths in self._patterns(config).items() if split in splits]
        settings = {key: value for key, value in entry.items() if key != "data_dir"}
        header: dict[str, Any] = {"configs": [settings | {"config_name": name, "data_files": files}]}
        if features := self._features(name):
            header["dataset_info"] = [{"config_name": name, "features": features}]
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
    def _real(self) -> Path:
        return self.path.resolve()

    @cached_property
    def _header(self) -> dict[str, Any]:
        """What README.md begins with; `.huggingface.yaml` says the same in a file of its own, and goes before it."""
        card, settings = self._real / "README.md", self._real / ".huggingface.yaml"
        parts = re.split(r"^---[ \t]*$", _text(card), maxsplit=2, flags=re.MULTILINE)
        header = _mapping(parts[1], card) if len(parts) == 3 and not parts[0].strip() else {}
        return header | _mapping(_text(settings), settings)

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        try:
            return {str(entry["config_name"]): entry for entry in self._header.get("configs") or []}
        except (TypeError, KeyError) as error:
            raise EvaluationError(
                f"{self._real}/README.md: `configs` is no list of mappings with config_name"
            ) from error

    def _chosen(self, config: str | None) -> dict[str, Any] | None:
        if config is not None:
            return self._configs.get(config)
        if len(self._configs) == 1:
            return next(iter(self._configs.values()))
        marked = [entry for entry in self._configs.values() if entry.get("default")]
        return marked[0] if marked else self._configs.get("default")

    def _instead_of(self, config: str | None) -> list[str]:
        """The configurations there are if this one is not."""
        if self._configs:
            return [] if self._chosen(config) is not None else sorted(self._configs)
        if config is None or (self._real / config).is_dir():
            return []
        files = [Path(file).relative_to(self._real) for found in self._inferred(self._real).values() for file in found]
        tops = {file.parts[0] for file in files if len(file.parts) > 1}
        return sorted(top for top in tops if not _is_part_of_a_configuration(top))

    def _patterns(self, config: str | None) -> Files:
        """What to read: the README's patterns in their order, or the files themselves."""
        entry = self._chosen(config)
        if entry is not None and entry.get("data_files") is not None:
            return self._listed(entry)
        if self._instead_of(config):
            return {}
        part = config if entry is None else entry.get("data_dir")
        place = self._real / (part or "")
        found = self._inferred(self._real if entry is None and not place.is_dir() else place)
        return {split: [glob.escape(file) for file in files] for split, files in found.items()}

    def _listed(self, entry: dict[str, Any]) -> Files:
        try:
            listed = sanitize_patterns(entry["data_files"])
        except (TypeError, ValueError) as error:
            raise EvaluationError(
                f"{self._real}/README.md: data_files of '{entry['config_name']}' cannot be understood: {error}"
            ) from error
        base = Path(glob.escape(str(self._real / (entry.get("data_dir") or ""))))
        return {split: [str(base / pattern) for pattern in patterns] for split, patterns in listed.items()}

    def _inferred(self, place: Path) -> Files:
        if place not in self._seen:
            self._seen[place] = _infer(place)
        return self._seen[place]

    @cached_property
    def _seen(self) -> dict[Path, Files]:
        """Looking through a place takes 20 ms."""
        return {}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _mapping(text: str, file: Path) -> dict[str, Any]:
    try:
        found = load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2024-13-45 is no YAMLError
        words = " ".join(str(error).split())
        raise EvaluationError(f"{file} begins with YAML that cannot be read: {words}") from error
    return found if isinstance(found, dict) else {}


def _infer(place: Path) -> Files:
    """The files below `place` that `datasets` would read, by split, and those named dev; see LocalFolder."""
    base = glob.escape(str(place))
    try:
        patterns = get_data_patterns(base)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise EvaluationError(f"the names of the files in {place} cannot be understood: {error}") from error
    found = {str(split): _of_one_format(_resolved(paths, base)) for split, paths in patterns.items()}
    if "validation" in found and "dev" not in found:
        dev = set(_resolved([pattern for pattern in patterns["validation"] if "dev" in pattern], base))
        named = [file for file in found["validation"] if file in dev]
        others = [file for file in found["validation"] if file not in dev]
        found |= {"dev": named, "validation": others or named}
    return {split: files for split, files in found.items() if files}


def _resolved(patterns: Sequence[str], base: str = "") -> list[str]:
    """The files, each once; none at all if one that is named outright does not exist, since then none can be loaded."""
    files: list[str] = []
    for pattern in patterns:
        try:
            files += resolve_pattern(pattern, base, allowed_extensions=_ALL_ALLOWED_EXTENSIONS)
        except FileNotFoundError:
            if not glob.has_magic(pattern):
                return []
    return list(dict.fromkeys(files))


def _of_one_format(files: list[str]) -> list[str]:
    """Those of the commonest format: `datasets` leaves the others out where it infers what to read."""
    module, _ = infer_module_for_data_files_list(DataFilesList(files, []))
    return [] if module is None else list(DataFilesList(files, []).filter(extensions=_MODULE_TO_EXTENSIONS[module]))


def _is_part_of_a_configuration(folder: str) -> bool:
    """Whether a folder of this name is one of data or of a split, not of a configuration."""
    return folder == "data" or not _WORDS_OF_SPLITS.isdisjoint(re.split(r"[-._ 0-9]+", folder))
