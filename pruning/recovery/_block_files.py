"""Fitted blocks in files: each is whole or not there, so that a killed fitting goes on at the block it was in."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruning.recovery._block_options import FittedBlock
from pruning.training.durable import is_complete, mark_complete

_WEIGHTS, _OUTCOME = "weights.safetensors", "outcome.json"


def keep(scratch: Path, index: int, identity: str, weights: dict[str, Tensor], outcome: FittedBlock) -> None:
    """Write one block of the run of that identity."""
    folder = _folder(scratch, index)
    folder.mkdir(parents=True)
    save_file(weights, folder / _WEIGHTS)
    (folder / _OUTCOME).write_text(outcome.model_dump_json(), encoding="utf-8")
    mark_complete(folder, identity)


def finished_(scratch: Path, identity: str, num_layers: int) -> list[FittedBlock]:
    """The first blocks of this run that are whole; what is left of others is deleted."""
    found: list[FittedBlock] = []
    while len(found) < num_layers and is_complete(folder := _folder(scratch, len(found)), identity):
        found.append(FittedBlock.model_validate_json((folder / _OUTCOME).read_bytes()))
    whole = {_folder(scratch, index) for index in range(len(found))}
    for path in scratch.glob("block-*"):
        if path not in whole:
            shutil.rmtree(path)
    return found


def load_(layer: nn.Module, scratch: Path, index: int) -> None:
    """Give a layer the weights that were kept of it."""
    put_(layer, load_file(_folder(scratch, index) / _WEIGHTS))


@torch.no_grad()
def put_(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a layer these weights, by their names in it."""
    for name, parameter in layer.named_parameters():
        parameter.copy_(weights[name])


def _folder(scratch: Path, index: int) -> Path:
    return scratch / f"block-{index}"
