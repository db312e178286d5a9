"""What the trainer says of a machine before it trains on it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from pruning.recovery import RecoveryInputs, lora
from pruning.training import trainer
from pruning.training.options import TrainingRun
from tests.pruning.recovery.test_lora import RECORDS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(("dtype", "slower", "warned"), [("bfloat16", 27, 1), ("bfloat16", 1.5, 0), ("float32", 27, 0)])
def test_bfloat16_that_a_cpu_only_emulates_is_warned_of(
    dtype: str,
    slower: float,
    warned: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(trainer, "emulated_bfloat16", lambda: slower)
    options = {"dtype": dtype, "max_steps": 1, "batch_size": 2, "micro_batch_size": 2}
    with caplog.at_level(logging.WARNING, logger="slimline"):
        inputs, config = RecoveryInputs(records=RECORDS), lora.Config.model_validate(options)
        lora.recover(tiny_model("llama"), tiny_tokenizer(), inputs, config, TrainingRun(tmp_path))
    said = [message for message in caplog.messages if "bfloat16" in message]
    assert len(said) == warned
    assert all("take 27 times as long as those of float32; set dtype: float32" in message for message in said)


def test_how_slow_it_is_is_measured() -> None:
    assert 0 < trainer.emulated_bfloat16() < math.inf
