"""The files: which there are, how they are called, and JSON in which infinity and NaN are words."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from flows.errors import SpecError
from flows.records.export import every_eval_ever, lm_eval_results
from flows.records.export.evaluated import Evaluated, evaluated
from infra.results.rows import RunRow
from infra.results.store import ResultsStore

Content = Callable[[Evaluated, str], dict[str, Any]]
FileName = Callable[[Evaluated], PurePath]

_FORMATS: dict[str, tuple[Content, FileName]] = {
    "lm-eval": (lm_eval_results.lm_eval_results, lm_eval_results.file_name),
    "every-eval-ever": (every_eval_ever.every_eval_ever, every_eval_ever.file_name),
}
#: bytes in a name; a file system takes 255
_LONGEST = 120


def export_run(store: ResultsStore, run: RunRow, form: str, folder: Path) -> list[Path]:
    """Write a file for each evaluated checkpoint of the run below `folder`, which is made; returns them.

    form: lm-eval or every-eval-ever. Raises SpecError if nothing was evaluated, or if the folder cannot be written.
    """
    found = list(evaluated(store, run))
    if not found:
        raise SpecError(
            f"run {run.run_key} evaluated nothing that could be exported; add evals to its spec and run it again"
        )
    content, file_name = _FORMATS[form]
    names = _folder_names([checkpoint.name for checkpoint in found])
    files = []
    try:
        for checkpoint in found:
            name = names[checkpoint.name]
            file = folder / name / file_name(checkpoint)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(in_words(content(checkpoint, name)), indent=2, ensure_ascii=False, allow_nan=False)
            unfinished = file.with_name(f"{file.name}.{os.getpid()}")
            unfinished.write_text(f"{text}\n", encoding="utf-8")
            unfinished.replace(file)
            files.append(file)
    except OSError as error:
        raise SpecError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from error
    return files


def in_words(value: Any) -> Any:
    """The same with "NaN", "Infinity" and "-Infinity" for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: in_words(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [in_words(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _folder_names(names: list[str]) -> dict[str, str]:
    """Names of folders, no two of them the same, also where large and small letters are."""
    safe = {name: safe_name(name) for name in names}
    taken = [each.casefold() for each in safe.values()]
    return {name: f"{each}-{_hash(name)}" if taken.count(each.casefold()) > 1 else each for name, each in safe.items()}


def safe_name(name: str) -> str:
    """A name for a file, as lm-eval makes one; what is too long or nothing but points gets a hash of the name."""
    safe = re.sub(r"[\"<>:/|\\?*\[\]\x00-\x1f]+", "__", name).strip(". ")
    if safe and len(safe.encode()) <= _LONGEST:
        return safe
    short = safe.encode()[: _LONGEST - 9].decode(errors="ignore")
    return f"{short}-{_hash(name)}".lstrip("-")


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
