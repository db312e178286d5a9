"""A checkpoint folder made clean: every weight under its own name, in one dtype, nothing twice, nothing that is no part
of the model, and a config that says so. What every loader reads is then the same."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from safetensors.torch import save_file

from pruning.checkpoints.folder import INDEX, WEIGHTS
from pruning.checkpoints.headers import write_index
from pruning.checkpoints.stored_tensors import StoredTensors, dtype_name, stored_tensors


def clean_(folder: Path) -> tuple[str, ...]:
    """Rewrite what is not clean in a checkpoint folder, one file at a time (all at once where experts are
    stored apart); the folder must be the caller's own.

    Returns what was changed, a clause each: nothing for a clean folder, which is left as it is to the bit. Raises
    PruningError if the folder is no checkpoint that can be loaded (see `stored_tensors`).
    """
    stored = stored_tensors(folder)
    if stored.oddities:
        _rewrite_(stored)
        _correct_config_(stored)
        left = stored_tensors(folder).oddities
        assert not left, f"{folder} is not clean yet: {left}"
    return stored.oddities


def _rewrite_(stored: StoredTensors) -> None:
    names: defaultdict[Path, list[str]] = defaultdict(list)
    for name, place in stored.places.items():
        names[place.file].append(name)
    written: list[Path] = []
    for file in sorted(names):
        save_file(stored.as_stored(stored.read(names[file])), _aside(file), metadata={"format": "pt"})
        written.append(file)
        if not stored.parts:  # else the experts of one weight may lie in several files
            _replace_(written)
    _replace_(written)
    for file in stored.files - names.keys():
        file.unlink()
    (stored.folder / INDEX).unlink(missing_ok=True)
    if [file.name for file in names] != [WEIGHTS]:
        write_index(stored.folder, sorted(file.name for file in names))


def _aside(file: Path) -> Path:
    return file.with_suffix(".unfinished")


def _replace_(files: list[Path]) -> None:
    """Put what was written aside in their place, and forget them."""
    while files:
        file = files.pop()
        _aside(file).replace(file)


def _correct_config_(stored: StoredTensors) -> None:
    path = stored.folder / "config.json"
    values = json.loads(path.read_bytes()) | {"dtype": dtype_name(stored.dtype)}
    if values.get("tie_word_embeddings", True) and not stored.is_tied:
        values["tie_word_embeddings"] = False
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
