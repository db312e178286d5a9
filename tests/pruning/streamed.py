"""SlimGPT on a checkpoint in a folder, stopped where a kill would come, with a count of the layers that are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pruning.checkpoints.decoder import StreamedDecoder
from pruning.checkpoints.save_load import load_checkpoint
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import slimgpt
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, windows


class Stop(Exception):
    """Raised where a kill would come."""


class Counted(StreamedDecoder):
    """Counts the layers that are read."""

    read = 0

    def layer(self, index: int, device: torch.device) -> nn.Module:
        Counted.read += 1
        return super().layer(index, device)


def stream(
    folder: Path, work: str, asked: slimgpt.Config, progress: Callable[[float, str], None] = lambda share, message: None
) -> tuple[Pruned, list[bytes]]:
    """Prune folder/source, going on from what folder/work has; the outcome and the files that were written."""
    source, out = folder / "source", folder / f"out-{work}"
    calibration = windows(load_checkpoint(source))
    pruned = prune_checkpoint(
        source, out, slimgpt, calibration, asked, options=CPU, work=folder / work, progress=progress
    )
    return pruned, [file.read_bytes() for file in sorted(out.glob("*.safetensors"))]
