"""Which checkpoints of a training are whole: marked after the last byte, with a digest of every file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

MARKER = "complete.json"


def identity_of(model: nn.Module, examples: Iterable[object], config_json: str) -> str:
    """A digest of what decides a run's outcome: config, examples, shapes and a sample of the weights."""
    digest = hashlib.sha256(config_json.encode())
    for example in examples:
        digest.update(repr(example).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {sample.tolist()}".encode())
    return digest.hexdigest()


def mark_complete(folder: Path, identity: str) -> None:
    """Say that a folder holds all of what it should, of the run of that identity."""
    files = _digests(folder, [path.name for path in folder.iterdir() if path.name != MARKER])
    aside = folder / f"{MARKER}.aside"
    aside.write_text(json.dumps({"identity": identity, "files": files}), encoding="utf-8")
    os.replace(aside, folder / MARKER)


def newest_complete_(folder: Path, identity: str, prefix: str = "checkpoint") -> Path | None:
    """The newest whole `<prefix>-<step>` of this run; half-written ones and those of other runs are deleted."""
    newest: tuple[int, Path] | None = None
    for path in folder.glob(f"{prefix}-*"):
        step = path.name.rpartition("-")[2]
        if not step.isdigit() or not is_complete(path, identity):
            shutil.rmtree(path, ignore_errors=True)
        elif newest is None or int(step) > newest[0]:
            newest = (int(step), path)
    return newest and newest[1]


def is_complete(folder: Path, identity: str) -> bool:
    """Whether it was marked by that run and every file is still what it was."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        return bool(marker == {"identity": identity, "files": _digests(folder, marker["files"])})
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _digests(folder: Path, names: Any) -> dict[str, str]:
    found = {}
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
