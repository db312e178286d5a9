"""Which checkpoints of a training are whole: marked after the last byte with digests of all files; the best weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from pruning.errors import PruningError
from pruning.sharding import take_, whole
from pruning.training.options import Curves, TrainingRun

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


class Best:
    """The weights of the best held-out loss so far, kept beside the Trainer's checkpoints."""

    def __init__(self, model: nn.Module, run: TrainingRun, identity: str, *, enabled: bool) -> None:
        self._model, self._run, self._identity, self.enabled = model, run, identity, enabled

    def keep(self, step: int) -> None:
        """Write the weights of this step, which are the best."""
        if not self.enabled:
            return
        weights = whole(self._trained().items(), kept=self._run.leads)
        if not self._run.leads:
            return
        folder = self._folder(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(weights, folder / "weights.safetensors")
        mark_complete(folder, self._identity)

    def drop_others(self, step: int) -> None:
        """Called when a checkpoint is whole that comes after `step`, the best: no run will go on before it."""
        if self._run.leads:
            for path in self._run.scratch.glob("best-*"):
                if path != self._folder(step):
                    shutil.rmtree(path, ignore_errors=True)

    def load_(self, curves: Curves) -> int:
        """Put the best weights into the model; returns their step. Raises PruningError if their file is not whole."""
        step = best_step(curves["heldout_loss"])
        if self._run.num_processes > 1:
            dist.barrier()
        folder = self._folder(step)
        if not is_complete(folder, self._identity):
            raise PruningError(
                f"the weights of step {step}, the best by held-out loss, are no longer whole in {folder}: run again"
            )
        tensors = load_file(folder / "weights.safetensors")
        for name, parameter in self._trained().items():
            take_(parameter, tensors[name])
        return step

    def _trained(self) -> dict[str, Any]:
        return {name: parameter.data for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def _folder(self, step: int) -> Path:
        return self._run.scratch / f"best-{step}"


def best_step(heldout_loss: Sequence[tuple[int, float]]) -> int:
    """The first step with the lowest loss."""
    return min(heldout_loss, key=lambda point: (point[1], point[0]))[0]


def _digests(folder: Path, names: Any) -> dict[str, str]:
    found = {}
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
