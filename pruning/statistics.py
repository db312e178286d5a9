"""Hessians of a model as it is, kept on disk: one capture serves every sparsity when errors are not propagated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pruning.calibration import CalibrationSet
from pruning.families import family_of
from pruning.hessian import Hessian
from pruning.sequential import SubLayer, SubLayerKind, WalkOptions, output_name, walk_layers


def capture_statistics(
    model: nn.Module,
    calibration: CalibrationSet,
    folder: Path,
    options: WalkOptions,
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Walk the model once and write the Hessians of every o_proj and down_proj input, one file each, into `folder`."""
    ids_NL = torch.cat([calibration.input_ids_NL, calibration.heldout_ids_ML])
    walk = walk_layers(model, family_of(model), ids_NL, options, num_heldout=len(calibration.heldout_ids_ML))
    for sub_layer in walk:
        tensors = {"matrix": sub_layer.hessian.matrix_II, "num_tokens": torch.tensor(sub_layer.hessian.num_tokens)}
        if sub_layer.heldout is not None:
            tensors["heldout_matrix"] = sub_layer.heldout.matrix_II
            tensors["heldout_num_tokens"] = torch.tensor(sub_layer.heldout.num_tokens)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, _file(folder, sub_layer.name))
        if sub_layer.kind == "mlp":
            on_layer(sub_layer.layer)


def captured_sub_layers(model: nn.Module, folder: Path, device: torch.device) -> Iterator[SubLayer]:
    """What the walk would yield, with the Hessians that `capture_statistics` wrote, one at a time in memory."""
    family = family_of(model)
    for index, layer in enumerate(family.layers(model)):
        linears: dict[SubLayerKind, nn.Linear] = {"attention": family.o_proj(layer), "mlp": family.down_proj(layer)}
        for kind, linear in linears.items():
            name = output_name(family, index, kind)
            tensors = load_file(_file(folder, name), device=str(device))
            hessian = Hessian(tensors["matrix"], int(tensors["num_tokens"]))
            heldout = None
            if "heldout_matrix" in tensors:
                heldout = Hessian(tensors["heldout_matrix"], int(tensors["heldout_num_tokens"]))
            yield SubLayer(index, kind, name, linear, hessian, heldout)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
