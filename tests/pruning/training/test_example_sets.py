"""Calibration windows put together anew: nothing twice, nothing lost, each of one end and one beginning."""

from __future__ import annotations

import torch

from pruning.calibration import CalibrationSet
from pruning.training.example_sets import splices, window_examples
from pruning.training.options import TrainingConfig

#: of which none goes on where another ends
WINDOWS = torch.arange(7 * 100).view(7, 100)[:, :24]


def test_every_token_occurs_once_a_pass_in_windows_of_an_end_and_a_beginning() -> None:
    passes = list(splices(WINDOWS, 5, 3))
    for spliced_NL in passes:
        assert torch.equal(spliced_NL.flatten().sort().values, WINDOWS.flatten())
        for window in spliced_NL:
            (jumps,) = (window.diff() != 1).nonzero(as_tuple=True)
            assert len(jumps) == 1, "one seam"
            cut = int(jumps) + 1
            assert window[cut] % 100 == 0, "the beginning of a window"
            assert window[cut - 1] % 100 == 23, "the end of one"
            assert window[cut] // 100 != window[0] // 100, "of two windows"
    assert len({tuple(each.flatten().tolist()) for each in passes}) == 5, "another each time"
    assert all(map(torch.equal, passes, splices(WINDOWS, 5, 3)))


def test_the_windows_themselves_come_first_and_held_out_ones_stay_whole() -> None:
    calibration = CalibrationSet(WINDOWS[:5], WINDOWS[5:], {})
    config = TrainingConfig(num_heldout=2)
    plain, spliced = (window_examples(calibration, config, spliced=passes) for passes in (0, 2))
    assert (len(plain.train), len(spliced.train), spliced.num_tokens) == (5, 15, plain.num_tokens)
    assert all(torch.equal(plain.train[index]["input_ids"], spliced.train[index]["input_ids"]) for index in range(5))
    assert spliced.heldout is not None
    assert torch.equal(spliced.heldout[1]["input_ids"], WINDOWS[6])
    assert plain.identity != spliced.identity
