"""A capture on disk gives back what the walk of the unchanged model yields."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pruning.calibration import CalibrationSet
from pruning.families import family_of
from pruning.sequential import walk_layers
from pruning.statistics import capture_statistics, captured_sub_layers
from tests.pruning.captured import CPU, outputs, windows
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("num_heldout", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_capture_and_read_back(name: str, num_heldout: int, tmp_path: Path) -> None:
    model = tiny_model(name)
    calibration = windows(model, num_heldout=num_heldout)
    capture_statistics(model, calibration, tmp_path, CPU)
    assert {path.name for path in tmp_path.iterdir()} == {f"{linear}.safetensors" for linear in outputs(model)}
    ids_NL = torch.cat([calibration.input_ids_NL, calibration.heldout_ids_ML])
    walk = walk_layers(model, family_of(model), ids_NL, CPU, num_heldout=num_heldout)
    for captured, walked in zip(captured_sub_layers(model, tmp_path, CPU.device), walk, strict=True):
        assert (captured.layer, captured.kind, captured.name) == (walked.layer, walked.kind, walked.name)
        assert captured.linear is walked.linear
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
    model, told = tiny_model("llama"), []
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calibration = windows(model)
    ids_NL = calibration.input_ids_NL.clone()
    capture_statistics(model, calibration, tmp_path, CPU, on_layer=told.append)
    assert told == [0, 1, 2]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(calibration.input_ids_NL, ids_NL)
    assert isinstance(calibration, CalibrationSet)
