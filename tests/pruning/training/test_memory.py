"""The estimate of memory: refused before it starts, with the options that would fit, and near what is measured."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pruning.errors import PruningError
from pruning.recovery.cpt import Config
from pruning.training import memory
from pruning.training.options import TrainingRun
from tests.tiny import tiny_model


def wanted(config: Config) -> int:
    model = tiny_model("llama", layers=8, hidden=256, intermediate=1024)
    return memory._training(model, model.config, config, 512, None).bytes


CONFIG = Config.model_validate({"micro_batch_size": 16, "batch_size": 16, "dtype": "float32"})


@pytest.mark.parametrize("option", ["micro_batch_size", "gradient_checkpointing", "optimizer"])
def test_each_option_that_is_named_takes_less(option: str) -> None:
    changes = {"micro_batch_size": 1, "gradient_checkpointing": True, "optimizer": "adafactor"}
    assert wanted(CONFIG.model_copy(update={option: changes[option]})) < wanted(CONFIG)


def test_what_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model("llama", layers=8, hidden=256, intermediate=1024)
    memory.check_memory(model, model.config, CONFIG, 512, TrainingRun(tmp_path))
    single = wanted(CONFIG.model_copy(update={"micro_batch_size": 1}))

    class Free:
        available = single + 1

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
    with pytest.raises(PruningError, match=r"training takes about .* GiB on cpu and .* are free .*micro_batch_size: 1"):
        memory.check_memory(model, model.config, CONFIG, 512, TrainingRun(tmp_path))
    Free.available = 1
    with pytest.raises(PruningError, match="take a larger device, or a smaller model"):
        memory.check_memory(model, model.config, CONFIG, 512, TrainingRun(tmp_path))
