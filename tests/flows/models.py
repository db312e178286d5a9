"""Models that a user might give and that slimline must refuse, made from the tiny one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def altered(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model with its tensors changed in place by `change`."""
    shutil.copytree(model, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def with_nan(model: Path, folder: Path) -> Path:
    """One weight of one layer is NaN."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = float("nan")

    return altered(model, folder, spoil)


def overflowing(model: Path, folder: Path) -> Path:
    """All weights are finite, but what they compute is not."""

    def blow_up(tensors: dict[str, Tensor]) -> None:
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30

    return altered(model, folder, blow_up)


def of_type(model: Path, folder: Path, model_type: str, architecture: str) -> Path:
    """The config says that it is another architecture."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": model_type, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
