"""The estimate of memory: refused before it starts, with the options that would fit, and near what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.recovery import lora
from pruning.recovery.cpt import Config
from pruning.training import memory
from pruning.training.adapters import merged_adapters
from pruning.training.options import TrainingConfig, TrainingRun
from tests.tiny import random_ids, tiny_model


def wanted(config: Config) -> int:
    model = tiny_model("llama", layers=8, hidden=256, intermediate=1024)
    return memory._training(model, model.config, config, 512, None).bytes


def kept_bytes(model: nn.Module, ids_BL: Tensor) -> int:
    """What a forward pass with its loss keeps for the way back, each storage once, parameters not."""
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def noted(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        loss = model(input_ids=ids_BL, labels=ids_BL).loss  # holds what was kept, so that no address comes twice
    assert loss.requires_grad
    return sum(kept.values())


def test_what_the_way_back_needs_is_near_what_is_kept_for_it() -> None:
    """Adapters too: each keeps inputs of its own, in float32."""
    model, longest = tiny_model("llama", layers=8, hidden=256, intermediate=704), 64
    ids_BL = random_ids(model, 4, longest)
    alone = {"micro_batch_size": 4, "dtype": "float32"}

    def counted(trained: nn.Module, config: TrainingConfig) -> float:
        training = memory._training(trained, model.config, config, longest, None)
        kept = training.bytes - replace(training, tokens=0).bytes
        return kept / kept_bytes(trained.train(), ids_BL)

    assert 0.7 < counted(model, Config.model_validate(alone)) < 1.5
    adapted = lora.Config.model_validate(alone)
    with merged_adapters(model, adapted) as trained:
        assert 1.0 < counted(trained, adapted) < 1.8, "less would let through what cannot fit"


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


def test_what_does_not_fit_whole_lies_in_pieces_over_the_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model("llama", layers=8, hidden=256, intermediate=1024)
    layers, config = model.model.layers, Config.model_validate({"micro_batch_size": 1, "dtype": "float32"})
    run = TrainingRun(tmp_path, num_processes=4)
    whole = memory._training(model, model.config, config, 8, None).bytes

    class Free:
        available = whole

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
    monkeypatch.setattr(dist, "all_reduce", lambda answer, op: None)  # the others are no worse off

    def check(config: Config, run: TrainingRun, layers: nn.Module | None = layers) -> bool:
        return memory.check_memory(model, model.config, config, 8, run, layers=layers)

    assert not check(config, run)
    assert check(config, replace(run, sharded=True))
    Free.available = whole // 2
    assert check(config, run)
    for alone in (replace(run, num_processes=1, sharded=True), replace(run, sharded=False)):
        with pytest.raises(PruningError, match="training takes about"):
            check(config, alone)
    with pytest.raises(PruningError, match="training takes about"):
        check(config, run, None)  # adapters
    Free.available = whole // 20
    with pytest.raises(PruningError, match="training takes about"):
        check(config, run)
    with pytest.raises(PruningError, match=r"optimizer adafactor knows whole weights only.*: take adamw, or unset it"):
        check(config.model_copy(update={"optimizer": "adafactor"}), replace(run, sharded=True))
