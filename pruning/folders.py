"""What is in a checkpoint folder: which class it wants and which file holds which tensor. Nothing in it is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pruning.errors import PruningError
from pruning.modeling import class_of


def class_of_folder(folder: Path) -> Any:
    """The causal LM class for a checkpoint folder.

    Raises PruningError if the folder is no checkpoint of a supported family or has no safetensors.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise PruningError(f"{folder} is not a checkpoint folder: it has no config.json")
    try:
        model_type = str(json.loads(path.read_bytes()).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise PruningError(f"{path} is not a model config: {error}") from error
    model_class = class_of(model_type)
    _check_weights(folder)
    return model_class


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a folder holds which tensor. Raises PruningError for an unreadable file."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as shard:
                found |= dict.fromkeys(shard.keys(), file)
        except (SafetensorError, OSError) as error:
            raise PruningError(f"cannot load the weights in {file}: {error}") from error
    return found


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise PruningError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when read: "
            "convert them to safetensors"
        )
    raise PruningError(f"{folder} has no weights: no .safetensors file")
