"""Whole experts: which go, by hand; what is left is the masked model, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of, shapes
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import experts
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, prune_copy, same_weights, windows
from tests.pruning.families.test_experts import Given, given, inputs_of
from tests.pruning.families.test_later_families import probe
from tests.tiny import tiny_model


def outputs_of(dense: PreTrainedModel, index: int, expert: int, seen: Given) -> tuple[Tensor, Tensor]:
    """Of the tokens that the expert gets: the norm of what it adds to the stream, and how many there are."""
    X_TI, weights_T = inputs_of(dense, index, expert, seen)
    down_CI = family_of(dense).layers(dense)[index].mlp.experts.down_proj[expert].detach().double()
    norms_T = (X_TI @ down_CI.T).norm(dim=1) * weights_T
    return norms_T[weights_T > 0].sum(), (weights_T > 0).sum()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {"experts": 1}),
        ("qwen3_moe", {"sparsity": 0.3, "score": "contribution"}),
        ("qwen3_moe", {"experts": 2, "score": "frequency", "allocation": "global"}),
    ],
)
def test_whole_experts_go(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_model(name)
    calibration, config = windows(dense), experts.Config(**options)
    masked, pruned = prune_copy(dense, config, calibration, method=experts)
    # by hand: of every layer those go that are worth least
    worth: dict[int, Tensor] = {}
    for index, shape in enumerate(shapes(dense)):
        if shape.num_experts:
            seen = given(dense, index, calibration.input_ids_NL)
            sums, counts = zip(
                *(outputs_of(dense, index, each, seen) for each in range(shape.num_experts)), strict=True
            )
            norms_E, counts_E = torch.stack(sums), torch.stack(counts)
            by_score = {"reap": norms_E / (counts_E + 8), "contribution": norms_E, "frequency": counts_E.double()}
            worth[index] = by_score[config.score]
            gone = set(range(shape.num_experts)) - set(pruned.plan.layers[index].kept_by_expert)
            assert gone == set(worth[index].topk(len(gone), largest=False).indices.tolist())
            assert len(gone) == options.get("experts", len(gone)) or config.allocation == "global"
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    assert (probe(masked) - probe(dense)).abs().max() > 1e-3
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=1e-5)
    assert pruned.achieved_sparsity == pytest.approx(1 - decoder_parameters(shrunk) / decoder_parameters(dense))
    assert type(shrunk) is type(dense) or config.allocation == "global"
    save_checkpoint(dense, None, tmp_path / "source")
    streamed = prune_checkpoint(
        tmp_path / "source", tmp_path / "out", experts, calibration, config, options=CPU, work=tmp_path / "work"
    )
    assert streamed.plan == pruned.plan
    assert same_weights(load_checkpoint(tmp_path / "out"), shrunk)
    assert pruned == Pruned.model_validate_json(pruned.model_dump_json())


def test_a_token_goes_to_no_more_experts_than_are_left() -> None:
    dense = tiny_model("mixtral")
    masked, pruned = prune_copy(dense, experts.Config(experts=3), method=experts)
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    assert (shrunk.config.num_local_experts, shrunk.config.num_experts_per_tok) == (1, 1)
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=1e-5)


def test_asking_for_too_many_or_too_few_experts_is_refused() -> None:
    llama, mixtral = tiny_model("llama"), tiny_model("mixtral")
    refused: list[tuple[PreTrainedModel, dict[str, Any], str]] = [
        (llama, {"experts": 1}, "a llama model has no experts to remove: take a method that cuts heads"),
        (mixtral, {"experts": 4}, "experts 4: of the layers that may lose some one has 4 experts"),
        (mixtral, {"sparsity": 0.8}, "sparsity 0.8 cannot be reached by dropping experts: with one left of each"),
        (mixtral, {"sparsity": 0.01}, "sparsity 0.01 is less than half of one expert of every layer"),
    ]
    for model, options, sentence in refused:
        with pytest.raises(PruningError, match=sentence):
            prune_copy(model, experts.Config(**options), method=experts)
    for both in ({}, {"experts": 1, "sparsity": 0.2}):
        with pytest.raises(ValueError, match="give either sparsity or experts"):
            experts.Config(**both)
