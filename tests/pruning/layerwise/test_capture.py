"""A capture on disk gives back what the walk of the unchanged model yields."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.layerwise.capture import capture_statistics
from pruning.statistics.hessian import Statistics
from pruning.walk.sequential import walk_layers
from tests.pruning.captured import CPU, outputs, same_weights, windows
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("num_heldout", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_capture_and_read_back(name: str, num_heldout: int, tmp_path: Path) -> None:
    model = tiny_model(name)
    decoder, calibration = ResidentDecoder(model), windows(model, num_heldout=num_heldout)
    capture_statistics(decoder, calibration, tmp_path, CPU)
    assert {path.name for path in tmp_path.iterdir()} == {f"{linear}.safetensors" for linear in outputs(model)}
    ids_NL = torch.cat([calibration.input_ids_NL, calibration.heldout_ids_ML])
    walk = walk_layers(decoder, ids_NL, CPU, num_heldout=num_heldout)
    given = walk_layers(decoder, ids_NL, CPU, num_heldout=num_heldout, statistics=Statistics(tmp_path))
    for captured, walked in zip(given, walk, strict=True):
        assert (captured.layer, captured.kind, captured.name) == (walked.layer, walked.kind, walked.name)
        assert torch.equal(captured.linear.weight, walked.linear.weight)
        assert captured.hessian is not None
        assert walked.hessian is not None
        assert torch.equal(captured.hessian.matrix_II, walked.hessian.matrix_II)
        assert captured.hessian.num_tokens == walked.hessian.num_tokens == 6 * 24
        if num_heldout:
            assert captured.heldout is not None
            assert walked.heldout is not None
            assert torch.equal(captured.heldout.matrix_II, walked.heldout.matrix_II)
            assert captured.heldout.num_tokens == 2 * 24
        else:
            assert captured.heldout is None


def test_capture_changes_nothing_and_tells_each_layer(tmp_path: Path) -> None:
    model, reported = tiny_model("llama"), []
    before = copy.deepcopy(model)
    calibration = windows(model)
    ids_NL = calibration.input_ids_NL.clone()
    capture_statistics(ResidentDecoder(model), calibration, tmp_path, CPU, on_layer=reported.append)
    assert reported == [0, 1, 2]
    assert same_weights(model, before)
    assert torch.equal(calibration.input_ids_NL, ids_NL)
    assert isinstance(calibration, CalibrationSet)


def test_with_statistics_only_heldout_samples_are_walked_and_unwanted_files_are_not_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    decoder, calibration = ResidentDecoder(model), windows(model)
    capture_statistics(decoder, calibration, tmp_path, CPU)
    poisoned_NL = torch.full_like(calibration.input_ids_NL, 10**6)  # no embedding has this number
    ids_NL = torch.cat([poisoned_NL, calibration.heldout_ids_ML])
    gone = tmp_path / "model.layers.1.mlp.down_proj.safetensors"
    gone.unlink()
    walk = walk_layers(
        decoder,
        ids_NL,
        CPU,
        num_heldout=2,
        wanted=lambda layer, kind: (layer, kind) != (1, "mlp"),
        statistics=Statistics(tmp_path),
    )
    assert [sub.name for sub in walk if sub.hessian is None] == [gone.stem]
