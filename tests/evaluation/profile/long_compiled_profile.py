"""A compiled model on CPU, which takes minutes: python -m pytest tests/evaluation/profile/long_compiled_profile.py"""

from __future__ import annotations

import torch

from evaluation.profile.config import ProfileConfig
from evaluation.profile.profiler import profile
from tests.tiny import tiny_model


def test_a_compiled_profile_is_not_compiled_anew_for_each_token() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = ProfileConfig(prompt_len=16, new_tokens=12, runs=3, compile=True)
    report = profile(tiny_model("llama", layers=1), config)
    assert report.points[0].speed is not None
    assert report.conditions()["compile"] is True
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # prompt, first and later steps
