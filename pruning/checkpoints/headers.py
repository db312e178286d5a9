"""The tensors in the weight files of a checkpoint folder, by what the heads of the files say: no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pruning.checkpoints.folder import INDEX, WEIGHTS
from pruning.errors import PruningError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its file, its name in there, and what the file says of it."""

    file: Path
    name: str
    shape: torch.Size
    dtype: str


def write_index(folder: Path, files: Iterable[str]) -> dict[str, torch.Size]:
    """Write the index of these weight files of a folder, and return the shapes of the tensors in them."""
    weight_map: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    total = 0
    for file in files:
        for place in _header(folder / file):
            weight_map[place.name], shapes[place.name] = file, place.shape
            total += place.shape.numel() * DTYPES[place.dtype].itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return shapes


def headers(folder: Path) -> list[Place]:
    """The tensors in the files that transformers reads, which need not be all that lie in the folder."""
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise PruningError(f"{folder} has neither {WEIGHTS} nor {INDEX}, so which of its files is the model?")
    try:
        files = sorted({str(name) for name in json.loads((folder / INDEX).read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningError(f"{folder / INDEX} is no index of shards ({error!r}): fetch it again") from error
    # what a missing file should hold is missing, and said by name
    return [place for file in files if (folder / file).is_file() for place in _header(folder / file)]


def _header(file: Path) -> list[Place]:
    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return [Place(file, name, torch.Size(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise PruningError(f"cannot load the weights in {file}: {error}") from error
