"""LoRA: what is trained on, what is left behind, and that a killed run ends with the same bits."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.instructions import prompt_of
from pruning.plan import PruningPlan
from pruning.recovery import RecordData, RecoveryReport
from pruning.recovery._records import IGNORED, choose, collate, encode
from pruning.recovery._resumable import MARKER
from pruning.recovery.lora import Config, _merged_adapters, recover
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


def run(model: PreTrainedModel, scratch: Path, config: Config = CONFIG, **options: object) -> RecoveryReport:
    return recover(model, tiny_tokenizer(), RECORDS, config, scratch=scratch, **options)


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name_a == name_b and torch.equal(x, y) for (name_a, x), (name_b, y) in pairs)


def test_prompts_are_the_alpaca_ones() -> None:
    with_input = prompt_of(RECORDS[0], RecordData())
    assert with_input.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert with_input.endswith("### Instruction:\nWhat is 0 and 0?\n\n### Input:\nAdd them.\n\n### Response:\n")
    without = prompt_of(RECORDS[1], RecordData())
    assert "Input" not in without
    assert without == prompt_of(RECORDS[1], RecordData(input=None))


def test_only_the_response_and_eos_carry_loss() -> None:
    tokenizer = tiny_tokenizer()
    examples = encode(tokenizer, RECORDS[:2], RecordData(), 512)
    batch = collate(0)(examples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, record in enumerate(RECORDS[:2]):
        labels = batch["labels"][row]
        learned = labels[labels != IGNORED]
        assert tokenizer.decode(learned) == record["output"] + "</s>"
        whole = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert tokenizer.decode(whole) == "<s>" + prompt_of(record, RecordData()) + record["output"] + "</s>"
        assert torch.equal(labels[labels != IGNORED], batch["input_ids"][row][labels != IGNORED])


def test_a_pad_token_without_an_embedding_is_not_fed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config = CONFIG.model_copy(update={"max_steps": 1})
    model, other = pruned(), pruned()
    recover(model, tokenizer, RECORDS, config, scratch=tmp_path / "a")
    run(other, tmp_path / "b", config)
    assert same(model, other)


def test_truncation_drops_examples_without_response() -> None:
    tokenizer = tiny_tokenizer()
    whole = encode(tokenizer, RECORDS[:2], RecordData(), 512)
    shorter = min(whole, key=lambda example: example.num_prompt)
    cut = encode(tokenizer, RECORDS[:2], RecordData(), shorter.num_prompt + 1)
    assert [example.ids for example in cut] == [shorter.ids[: shorter.num_prompt + 1]]
    with pytest.raises(PruningError, match="none of the 2 training records has a response within max_length=20"):
        encode(tokenizer, RECORDS[:2], RecordData(), 20)


def test_a_tokenizer_that_adds_eos_itself_gets_one_only() -> None:
    class WithEos:
        eos_token_id = 1

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*ids, 1] for ids in tiny_tokenizer()(texts)["input_ids"]]}

    assert encode(WithEos(), RECORDS, RecordData(), 512) == encode(tiny_tokenizer(), RECORDS, RecordData(), 512)  # type: ignore[arg-type]


def test_subsets_are_seeded() -> None:
    assert choose(RECORDS, None, 0) == RECORDS
    assert choose(RECORDS, 5, 0) == choose(RECORDS, 5, 0) != choose(RECORDS, 5, 1)
    assert len({record["output"] for record in choose(RECORDS, 5, 0)}) == 5


def test_unusable_records_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(PruningError, match="no training records"):
        choose([], None, 0)
    with pytest.raises(PruningError, match="num_examples is 17, but the data set has 16"):
        choose(RECORDS, 17, 0)
    with pytest.raises(
        PruningError, match=r"record 0 has no text in column 'output'; it has \['input', 'instruction'\]"
    ):
        encode(tokenizer, [{"instruction": "a", "input": "b"}], RecordData(), 512)
    with pytest.raises(PruningError, match="column 'question'"):
        encode(tokenizer, RECORDS, RecordData(instruction="question"), 512)
    tokenizer.eos_token = None
    with pytest.raises(PruningError, match="no EOS"):
        encode(tokenizer, RECORDS, RecordData(), 512)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_equal_the_adapters(name: str) -> None:
    model = pruned(name)
    before, keys = logits(model), list(model.state_dict())
    with _merged_adapters(model, CONFIG) as adapted:
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
    assert report.final_loss < report.losses[0][1] - 0.5
    assert [step for step, _ in report.losses] == list(range(1, 21))
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


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.pruning.recovery.test_lora import pruned, run

def kill(share, message):
    if message.startswith("step 5/"):
        os.kill(os.getpid(), signal.SIGKILL)

run(pruned(), Path(sys.argv[1]), progress=kill)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, scratch = pruned(), tmp_path / "scratch"
    expected = run(whole, tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(scratch)], cwd=ROOT, env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in scratch.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    (scratch / "checkpoint-6").mkdir()  # as if killed while the next one was being written
    damaged = scratch / "checkpoint-4" / "optimizer.pt"
    twin = tmp_path / "twin"
    subprocess.run(["cp", "-r", str(scratch), str(twin)], check=True)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for folder, first_step in ((twin, 5), (scratch, 3)):
        reported: list[str] = []
        resumed = pruned()
        report = run(resumed, folder, progress=lambda share, message, reported=reported: reported.append(message))
        assert reported[0].startswith(f"step {first_step}/6")
        assert report == expected
        assert same(resumed, whole)


class _Told(Exception):
    pass


@pytest.mark.parametrize("step", [1, 3, 5])
def test_what_the_progress_raises_ends_the_training_with_a_checkpoint(step: int, tmp_path: Path) -> None:
    """An epoch has four steps, and a checkpoint is due after every other one: neither matters."""
    whole, model, scratch = pruned(), pruned(), tmp_path / "scratch"
    before = copy.deepcopy(model)
    expected = run(whole, tmp_path / "whole")

    def tell(share: float, message: str) -> None:
        if message.startswith(f"step {step}/"):
            raise _Told(message)

    with pytest.raises(_Told, match=f"step {step}/6"):
        run(model, scratch, progress=tell)
    assert same(model, before), "the model is as it was"
    assert (scratch / f"checkpoint-{step}" / MARKER).exists()
    reported: list[str] = []
    resumed = pruned()
    assert run(resumed, scratch, progress=lambda share, message: reported.append(message)) == expected
    assert reported[0].startswith(f"step {step + 1}/6")
    assert same(resumed, whole)


def test_scratch_of_another_run_is_not_taken(tmp_path: Path) -> None:
    run(pruned(), tmp_path, CONFIG.model_copy(update={"seed": 1}))
    fresh, after_other = pruned(), pruned()
    assert run(after_other, tmp_path) == run(fresh, tmp_path / "fresh")
    assert same(after_other, fresh)
    reported: list[str] = []
    again = pruned()
    run(again, tmp_path, progress=lambda share, message: reported.append(message))
    assert not reported
    assert same(again, fresh)
    marker = json.loads((tmp_path / "checkpoint-6" / "complete.json").read_text())
    assert "adapter_model.safetensors" in marker["files"]


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
