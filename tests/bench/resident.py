"""Pruning of a model in memory exactly as the product does it, with a clock."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import shrink_
from pruning.methods import slimgpt
from pruning.walk.options import WalkOptions
from pruning.walk.state import MemoryWalkState, Pruned
from tests.bench.options import Options
from tests.bench.timing import bar, seconds


@dataclass(frozen=True)
class Pruning:
    """One pruning of a model that is itself unchanged."""

    pruned: Pruned
    walk_state: MemoryWalkState
    seconds: float

    @property
    def split(self) -> str:
        """The split that was carried out."""
        return self.pruned.split or ""

    def smaller(self, model: PreTrainedModel) -> PreTrainedModel:
        """A pruned copy of the model."""
        result = copy.deepcopy(model)
        self.walk_state.apply_(result)
        shrink_(result, self.pruned.plan)
        return result


def prune(
    model: PreTrainedModel, calibration: CalibrationSet, config: slimgpt.Config, options: Options, title: str
) -> Pruning:
    """slimgpt.prune over a resident model, timed from the call to its return."""
    walk = WalkOptions(torch.device(options.device), batch_size=options.batch_size)
    walk_state = MemoryWalkState()
    with bar(title) as progress:
        pruned, took = seconds(
            lambda: slimgpt.prune(
                ResidentDecoder(model), calibration, config, options=walk, walk_state=walk_state, progress=progress
            ),
            options.device,
        )
    return Pruning(pruned, walk_state, took)
