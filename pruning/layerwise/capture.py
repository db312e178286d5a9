"""Hessians of a model as it is, kept on disk: one capture serves every sparsity when errors are not propagated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import Decoder
from pruning.statistics.hessian import Statistics
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import walk_layers


def capture_statistics(
    decoder: Decoder,
    calibration: CalibrationSet,
    folder: Path,
    options: WalkOptions,
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Walk the model once and write the Hessians of every o_proj and down_proj input, also of each expert, into
    `folder`, one file each."""
    ids_NL = torch.cat([calibration.input_ids_NL, calibration.heldout_ids_ML])
    for sub_layer in walk_layers(decoder, ids_NL, options, num_heldout=len(calibration.heldout_ids_ML)):
        assert sub_layer.hessian is not None
        tensors = {"matrix": sub_layer.hessian.matrix_II, "num_tokens": torch.tensor(sub_layer.hessian.num_tokens)}
        if sub_layer.hessian.assumed_tokens:
            tensors["assumed_tokens"] = torch.tensor(sub_layer.hessian.assumed_tokens)
        if sub_layer.heldout is not None:
            tensors["heldout_matrix"] = sub_layer.heldout.matrix_II
            tensors["heldout_num_tokens"] = torch.tensor(sub_layer.heldout.num_tokens)
        if options.process_group.leads:
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                Statistics(folder).file(sub_layer.name),
            )
        if sub_layer.ends_layer:
            on_layer(sub_layer.layer)
        del sub_layer, tensors  # before the next Hessian is there
