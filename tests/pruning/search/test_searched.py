"""SlimGPT by a search over levels: never worse than its start, of the same size, and a kill changes nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder, StreamedDecoder
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters
from pruning.layerwise import streaming
from pruning.layerwise.kl import final_stream, mean_kl
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import slimgpt
from pruning.methods.slimgpt import Config
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, logits, prune_copy, same_weights, windows
from tests.tiny import random_ids, tiny_model


def config(sparsity: float = 0.3, **more: Any) -> Config:
    asked = {"allocation": "searched", "start": "curve", "split": "equal", "forwards": 12, "levels": 1}
    return Config(**({"sparsity": sparsity} | asked | more))


def heldout_kl(dense: PreTrainedModel, masked: PreTrainedModel) -> float:
    """Of the windows that judge, measured anew."""
    ids_ML = windows(dense).heldout_ids_ML
    streams = [final_stream(ResidentDecoder(model), ids_ML, CPU) for model in (dense, masked)]
    return mean_kl(ResidentDecoder(dense), *streams, CPU)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"search": "evolution"}),
        ("llama", {"start": "knapsack", "split": None, "steps": 2, "forwards": 16}),
        ("opt", {"channel_multiple": 4, "protect_last": 1}),
        ("olmo2", {"head_unit": "kv_group", "ridge": "heldout"}),
        ("gemma2", {"head_unit": "query_head", "split": "ffn"}),
    ],
)
def test_no_worse_than_its_start_at_the_same_size(name: str, more: dict[str, Any]) -> None:
    dense = tiny_model(name)
    asked = config(**more)
    masked, pruned = prune_copy(dense, asked)
    of_start = {"start", "search", "forwards", "levels"}
    start = Config(**(asked.model_dump(exclude=of_start) | {"allocation": asked.start}))
    begun, began = prune_copy(dense, start)
    first, *others = pruned.search
    assert first.kind == "start"
    assert first.heldout_kl == pytest.approx(heldout_kl(dense, begun), rel=1e-4), (
        "the start is what that allocation gives"
    )
    assert others
    assert others[-1].forwards <= asked.forwards
    assert heldout_kl(dense, masked) == pytest.approx(
        min(t.heldout_kl for t in pruned.search if t.windows == 2), rel=1e-4
    )
    assert heldout_kl(dense, masked) <= heldout_kl(dense, begun) * (1 + 1e-5)
    assert pruned.achieved_sparsity == pytest.approx(began.achieved_sparsity, abs=0.005)
    assert abs(pruned.achieved_sparsity - 0.3) <= 0.0051
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    assert pruned.achieved_sparsity == pytest.approx(1 - decoder_parameters(shrunk) / decoder_parameters(dense))
    torch.testing.assert_close(
        logits(shrunk, random_ids(dense)), logits(masked, random_ids(dense)), atol=2e-5, rtol=1e-5
    )
    assert len(pruned.layers) == 6
    assert all(report.measured_error for report in pruned.layers if report.kept < report.total)
