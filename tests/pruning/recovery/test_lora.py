"""LoRA: what is adapted, what is left behind, and what is kept beside it."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.plan import PruningPlan
from pruning.recovery import RecoveryInputs, RecoveryReport
from pruning.recovery.lora import Config, recover
from pruning.training.adapters import merged_adapters
from pruning.training.options import TrainingRun
from tests.pruning.checkpoints.test_surgery import logits, plan_for
from tests.tiny import FAMILIES, add_noise_, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # not in `make test-fast`

ROOT = Path(__file__).parents[3]
RECORDS = [
    {"instruction": f"What is {i} and {i}?", "input": "" if i % 2 else "Add them.", "output": f"It is {2 * i}."}
    for i in range(16)
]
CONFIG = Config(batch_size=4, micro_batch_size=2, max_steps=6, learning_rate=1e-2, warmup_steps=1, save_steps=2)


def pruned(name: str = "qwen2") -> PreTrainedModel:
    model = tiny_model(name)
    shrink_(model, plan_for(model, seed=1))
    return model


def run(model: PreTrainedModel, scratch: Path, config: Config = CONFIG, **options: Any) -> RecoveryReport:
    return recover(model, tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, TrainingRun(scratch, **options))


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name_a == name_b and torch.equal(x, y) for (name_a, x), (name_b, y) in pairs)


def test_a_pad_token_without_an_embedding_is_not_fed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config = CONFIG.model_copy(update={"max_steps": 1})
    model, other = pruned(), pruned()
    recover(model, tokenizer, RecoveryInputs(records=RECORDS), config, TrainingRun(tmp_path / "a"))
    run(other, tmp_path / "b", config)
    assert same(model, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_equal_the_adapters(name: str) -> None:
    model = pruned(name)
    before, keys = logits(model), list(model.state_dict())
    with merged_adapters(model, CONFIG) as adapted:
        add_noise_(nn.ModuleList(m for n, m in adapted.named_modules() if n.endswith(("lora_A", "lora_B"))), 0)
        adapted.eval()
        with_adapters = logits(adapted)
    assert (with_adapters - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model), with_adapters, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_lowers_the_loss_and_leaves_a_plain_model(
    dtype: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = pruned()
    attributes, kind, untouched = set(vars(model)), type(model), copy.deepcopy(model)
    random_state = torch.get_rng_state()
    reported: list[tuple[float, str]] = []
    config = CONFIG.model_copy(update={"dtype": dtype, "max_steps": None, "epochs": 5.0})
    report = run(model, tmp_path / "run", config, progress=lambda share, message: reported.append((share, message)))
    losses = report.curves["train_loss"]
    assert report.final_loss < losses[0][1] - 0.5
    assert [step for step, _ in losses] == list(range(1, 21))
    assert report.num_steps == 20
    assert report.num_examples == 16
    assert report.num_tokens > 16 * 50
    assert reported[-1][0] == 1.0
    assert reported[-1][1].startswith("step 20/20, loss ")
    assert RecoveryReport.model_validate_json(report.model_dump_json()) == report
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert not model.training
    assert model.config.use_cache
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == untouched.config.to_dict()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capfd.readouterr().out == ""
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, untouched.state_dict()[name])
    }
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)
    save_checkpoint(model, None, tmp_path / "merged")
    assert torch.equal(logits(load_checkpoint(tmp_path / "merged")), logits(model))


def test_targets_and_layers_without_channels(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    full = PruningPlan.full(model_shapes := plan_for(model).source, 4)
    empty = full.layers[0].model_copy(update={"kept_channels": ()})
    shrink_(model, PruningPlan(source=model_shapes, head_dim=4, layers=(empty, full.layers[1])))
    before = copy.deepcopy(model.state_dict())
    run(model, tmp_path, CONFIG.model_copy(update={"targets": ("v", "down"), "max_steps": 2}))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_loss_that_is_not_finite_is_told_and_leaves_the_model(tmp_path: Path) -> None:
    model = pruned()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = math.nan
    before = copy.deepcopy(model)
    with pytest.raises(PruningError, match=r"loss became nan at step 1: lower learning_rate \(now"):
        run(model, tmp_path)
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), before.model.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_configs_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="batch_size 64 is not a multiple of micro_batch_size 5"):
        Config(micro_batch_size=5)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Config.model_validate({"lerning_rate": 1})
    with pytest.raises(PruningError, match="cannot train on cuda:1"):
        run(pruned(), tmp_path, device="cuda:1")
    assert Config.model_validate_json(CONFIG.model_dump_json()) == CONFIG


def test_the_module_is_light() -> None:
    code = "import sys, pruning.recovery.lora; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_presets_are_settings_in_which_options_may_be_replaced() -> None:
    paper = Config.model_validate({"preset": "shortened-llama", "epochs": 1})
    assert (paper.epochs, paper.warmup_steps, paper.rank, paper.batch_size) == (1, 100, 8, 64)
    assert Config.model_validate({"preset": "slimgpt"}) == Config()
    assert "preset" not in paper.model_dump()
    with pytest.raises(ValidationError, match="unknown preset 'slim'; available: slimgpt, shortened-llama"):
        Config.model_validate({"preset": "slim"})
    with pytest.raises(
        ValidationError, match="unknown data 'alpacca'; available: alpaca, gpt4-alpaca, stanford-alpaca"
    ):
        Config.model_validate({"data": "alpacca"})


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_the_adapter_beside_the_model_gives_the_same_model(options: dict[str, Any], tmp_path: Path) -> None:
    model, base = pruned(), pruned()
    config = CONFIG.model_copy(update={"dtype": "float32", **options})
    beside = tmp_path / "beside"
    assert run(model, tmp_path / "run", config, beside=beside).adapter
    adapted = PeftModel.from_pretrained(base, str(beside / "adapter"))
    assert not torch.equal(logits(model), logits(pruned()))
    torch.testing.assert_close(logits(adapted.eval()), logits(model), atol=1e-4, rtol=0)


def test_variants_of_lora_learn_otherwise(tmp_path: Path) -> None:
    finals = {}
    for name, options in {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}.items():
        config = CONFIG.model_copy(update={"dtype": "float32", **options})
        finals[name] = run(pruned(), tmp_path / name, config).final_loss
    assert len(set(finals.values())) == 3
