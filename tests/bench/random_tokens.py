"""Calibration on random tokens, for models that were never trained."""

from __future__ import annotations

import torch

from pruning.calibration import CalibrationSet
from tests.bench.options import Windows


def random_calibration(vocab_size: int, windows: Windows, *, seed: int = 0) -> CalibrationSet:
    """Windows of random tokens, none held out."""
    generator = torch.Generator().manual_seed(seed)
    ids_NL = torch.randint(2, vocab_size, (windows.count, windows.length), generator=generator)
    return CalibrationSet(ids_NL, ids_NL[:0].clone(), {"dataset": "random tokens", "seed": seed})
