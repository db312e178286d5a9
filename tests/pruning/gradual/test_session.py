"""Trainings that prune: killed ones end with the same bits, and what cannot work is said in a sentence."""

from __future__ import annotations

import copy
import signal
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pruning.errors import PruningError
from pruning.families import decoder_parameters
from pruning.gradual.prompt import PROMPT, with_prompt
from pruning.gradual.session import TrainedPruning
from pruning.methods import compresso, loraprune
from pruning.recovery import RecoveryInputs
from pruning.training.batches import IGNORED
from pruning.training.data import RecordData
from pruning.training.example_sets import record_examples
from pruning.training.options import TrainingRun
from tests.pruning.captured import RECORDS, TRAINING, logits, random_ids, same_weights
from tests.pruning.killed import exit_code, kill_this_process
from tests.pruning.recovery.test_contract import texts
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # not in `make test-fast`

ROOT = Path(__file__).parents[3]
RUN: dict[str, Any] = {**TRAINING, "max_steps": 6, "save_steps": 2, "num_heldout": 2, "heldout_steps": 2}
TEXT: dict[str, Any] = {"data": {"dataset": "texts"}, "num_tokens": 16 * 24, "seq_len": 24}
CASES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "loraprune": (loraprune, {}),
    "loraprune-global": (loraprune, {**TEXT, "allocation": "global", "gradient_checkpointing": True}),
    "compresso": (compresso, {"prompt": True}),
    "compresso-heads": (compresso, {**TEXT, "head_unit": "query_head", "gradient_checkpointing": True, "dora": True}),
}


def run(case: str, model: Any, scratch: Path, progress: Any = lambda share, message: None, **more: Any) -> Any:
    module, changes = CASES[case]
    config = module.Config.model_validate({**RUN, "sparsity": 0.35, **changes, **more})
    inputs = RecoveryInputs(texts, RECORDS, "x")
    return module.train(model, tiny_tokenizer(), inputs, config, TrainingRun(scratch, progress=progress))


def figures(pruned: TrainedPruning) -> dict[str, Any]:
    """All but the speed."""
    found = pruned.model_dump()
    del found["curves"]["tokens_per_second"]
    return found


def killed_at_step_5(case: str, scratch: str) -> None:
    def kill(share: float, message: str) -> None:
        if message.startswith("step 5/"):
            kill_this_process()

    run(case, tiny_model("qwen2"), Path(scratch), kill)


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(case: str, tmp_path: Path) -> None:
    whole, scratch = tiny_model("qwen2"), tmp_path / "scratch"
    attributes, dense = set(vars(whole)), copy.deepcopy(whole)
    expected = figures(run(case, whole, tmp_path / "whole"))
    assert (set(vars(whole)), whole.training) == (attributes, False)
    assert not any(module._forward_pre_hooks for module in whole.modules())
    assert decoder_parameters(whole) == decoder_parameters(dense)
    code = exit_code(f"{__name__}:killed_at_step_5", case, str(scratch), imports=("pruning.gradual.session", "peft"))
    assert code == -signal.SIGKILL
    assert sorted(path.name for path in scratch.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    twin = tmp_path / "twin"
    subprocess.run(["cp", "-r", str(scratch), str(twin)], check=True)
    damaged = scratch / "checkpoint-4" / "along.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    for folder, first_step in ((twin, 5), (scratch, 3), (scratch, 7)):  # the last has nothing left to do
        reported: list[str] = []
        resumed = tiny_model("qwen2")
        pruned = run(case, resumed, folder, lambda share, message, reported=reported: reported.append(message))
        steps = [message for message in reported if message.startswith("step")]
        assert len(steps) == 7 - first_step
        assert not steps or steps[0].startswith(f"step {first_step}/6")
        assert figures(pruned) == expected
        assert same_weights(resumed, whole)


def test_what_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Told(Exception):
        pass

    def tell(share: float, message: str) -> None:
        if message.startswith("step 3/"):
            raise Told

    for case in ("loraprune", "compresso"):
        model = tiny_model("llama")
        before = copy.deepcopy(model)
        with pytest.raises(Told):
            run(case, model, tmp_path / case, tell)
        assert same_weights(model, before)
        assert torch.equal(logits(model, random_ids(model)), logits(before, random_ids(model)))


@pytest.mark.parametrize("case", ["loraprune", "loraprune-global", "compresso"])
def test_what_is_protected_or_left_out_stays_whole(case: str, tmp_path: Path) -> None:
    protected = run(case, tiny_model("llama"), tmp_path / "a", sparsity=0.2, protect_first=1)
    assert protected.plan.shapes[0] == protected.plan.source[0]
    ffn = run(case, tiny_model("llama"), tmp_path / "b", sparsity=0.2, split="ffn")
    assert {shape.num_heads for shape in ffn.plan.shapes} == {8}
    attention = run(case, tiny_model("llama"), tmp_path / "c", sparsity=0.2, split="attention")
    assert {shape.intermediate_size for shape in attention.plan.shapes} == {48}
    assert {report.kept for report in attention.layers if report.sub_layer == "mlp"} == {48}


@pytest.mark.parametrize(
    ("case", "options", "sentence"),
    [
        ("loraprune", {"sparsity": 0.97}, "sparsity 0.97 cannot be reached"),
        ("compresso", {"sparsity": 0.5, "split": "attention"}, "sparsity 0.5 cannot be reached"),
        ("loraprune", {"targets": ("up", "down")}, "none of the targets says what the heads of .*o_proj are worth"),
        ("loraprune", {"dora": True}, "dora: true learns the size of each weight apart"),
        ("loraprune", {"initial_warmup": 0.6, "final_warmup": 0.4}, "leave no steps to prune in"),
        ("loraprune", {"keep": "best"}, "keep: best judges by held-out loss, which rises while the model is pruned"),
        ("compresso", {"patience": 2}, "patience: 2 judges by held-out loss"),
        ("compresso-heads", {"prompt": True}, "prompt: true stands in front of instruction records"),
        ("compresso", {"split": "half"}, "split"),
        ("compresso", {"num_examples": 15}, "num_examples is 17, but the data set has 16 records"),
        ("loraprune", {"learning_rate": 1e30}, "the held-out loss rose from .* to nan"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(
    case: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=sentence):
        run(case, model, tmp_path, **options)
    assert same_weights(model, before)


def test_several_processes_and_short_contexts_are_refused(tmp_path: Path) -> None:
    config = compresso.Config(sparsity=0.3, prompt=True, **RUN)
    inputs = RecoveryInputs(records=RECORDS)
    with pytest.raises(PruningError, match="runs in one process, not in 2"):
        compresso.train(tiny_model("llama"), tiny_tokenizer(), inputs, config, TrainingRun(tmp_path, num_processes=2))
    short = tiny_model("llama", max_position_embeddings=200)
    with pytest.raises(PruningError, match=r"with the prompt in front of it an example has .* context is 200"):
        compresso.train(short, tiny_tokenizer(), inputs, config, TrainingRun(tmp_path))


@pytest.mark.parametrize("module", [loraprune, compresso])
def test_lengths_and_ranks_are_checked_before_any_work(module: Any) -> None:
    records = module.Config(sparsity=0.3, data="alpaca", max_length=600)
    with pytest.raises(PruningError, match="max_length 600 is longer than the model's context of 512"):
        module.check_training(records, 32, 512)
    texts_ = module.Config(sparsity=0.3, data="c4", seq_len=600)
    with pytest.raises(PruningError, match="seq_len 600 is longer than the model's context of 512"):
        module.check_training(texts_, 32, 512)
    with pytest.raises(PruningError, match="rank 64 is more than the 32"):
        module.check_training(module.Config(sparsity=0.3, rank=64), 32, None)
    assert module.scratch_bytes(texts_, 0, 2, 32, 48) > module.scratch_bytes(records, 0, 2, 32, 48) > 0


def test_the_prompt_is_read_but_not_learnt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = compresso.Config(sparsity=0.3, **RUN)
    data = record_examples(tokenizer, RECORDS, RecordData(), config, None, 256)
    prompted = with_prompt(data, tokenizer)
    added = len(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    assert (prompted.longest, len(prompted.train)) == (data.longest + added, len(data.train))
    assert prompted.num_tokens == data.num_tokens + added * len(data.train)
    assert prompted.identity != data.identity
    assert prompted.heldout is not None
    before, after = data.train[3], prompted.train[3]
    assert tokenizer.decode(after["input_ids"]).startswith(f"<s>{PROMPT}")
    assert torch.equal(after["input_ids"][1 + added :], before["input_ids"][1:])
    assert torch.equal(after["labels"][1 + added :], before["labels"][1:])
    assert (after["labels"][: 1 + added] == IGNORED).all()
