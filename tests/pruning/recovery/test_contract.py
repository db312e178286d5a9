"""What every recovery promises: it learns, leaves a plain model, and a killed one ends with the same bits."""

from __future__ import annotations

import copy
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from infra.registry import available, load
from pruning.calibration import CalibrationSet
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.plan import PruningPlan
from pruning.recovery import RecoveryInputs, RecoveryReport
from pruning.training.durable import MARKER
from pruning.training.options import TrainingRun
from tests.pruning.checkpoints.test_surgery import logits, plan_for
from tests.pruning.killed import exit_code, kill_this_process
from tests.pruning.recovery.test_lora import RECORDS, same
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # not in `make test-fast`

ROOT = Path(__file__).parents[3]
COMMON: dict[str, Any] = {
    "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1, "save_steps": 2, "max_steps": 6,
    "num_heldout": 2, "heldout_steps": 2, "dtype": "float32", "keep": "best",
}  # fmt: skip
TEXT: dict[str, Any] = {"data": {"dataset": "texts"}, "num_tokens": 16 * 24, "seq_len": 24}
#: what a recovery imports when it begins
TRAINER = ("pruning.recovery._session", "pruning.training.adapters", "peft")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"watch": {"dataset": "other", "num_windows": 2, "seq_len": 24}}),
    "cpt": ("cpt", TEXT),
    "cpt-across": ("cpt", {**TEXT, "cross_document_attention": True, "gradient_checkpointing": True}),
    "distill": ("distill", {**TEXT, "hard_weight": 0.3, "hidden_weight": 0.1, "temperature": 2.0}),
    "distill-cache": ("distill", {**TEXT, "teacher_logits": "cache", "top_k": 20}),
    "distill-adapters": ("distill", {"data": {"dataset": "r", "template": "alpaca"}, "adapters": {"rank": 4}}),
    "reconstruct": ("reconstruct", {}),
    "reconstruct-both": ("reconstruct", {"mode": "both", "blocks": {"passes": 2}}),
}


@cache
def dense() -> PreTrainedModel:
    return tiny_model("qwen2")


@cache
def plan() -> PruningPlan:
    return plan_for(tiny_model("qwen2"), seed=1)


@cache
def checkpoint() -> str:
    model = tiny_model("qwen2")
    shrink_(model, plan())
    folder = tempfile.mkdtemp()
    save_checkpoint(model, None, folder)
    return folder


def pruned() -> PreTrainedModel:
    return load_checkpoint(checkpoint())


def texts() -> Iterator[str]:
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "looked",
        "at",
        "every",
        "bird",
        "that",
        "flew",
        "over",
        "it",
        "in",
        "vain",
    ]
    order = random.Random(0)
    yield from (" ".join(order.choices(words, k=order.randint(3, 30))) + "." for _ in range(60))


def watched() -> Iterator[str]:
    yield from ("the bird that sat on a mat", "looked at the cat", "and flew") * 20


def inputs() -> RecoveryInputs:
    ids = torch.randint(2, 300, (12, 24), generator=torch.Generator().manual_seed(3))
    calibration = CalibrationSet(ids[:10], ids[10:], {})
    return RecoveryInputs(
        texts, RECORDS, watched, "x", lambda: copy.deepcopy(dense()), tiny_tokenizer, calibration, plan()
    )


def run(case: str, model: PreTrainedModel, scratch: Path, **options: Any) -> RecoveryReport:
    name, changes = CASES[case]
    module = load("pruning.recovery", name, "recovery")
    more = {key: options.pop(key) for key in list(options) if key in module.Config.model_fields and key != "rank"}
    config = module.Config.model_validate({**COMMON, **changes, **more})
    report: RecoveryReport = module.recover(model, tiny_tokenizer(), inputs(), config, TrainingRun(scratch, **options))
    return report


def figures(report: RecoveryReport) -> dict[str, Any]:
    """All but the speed."""
    found = report.model_dump()
    del found["curves"]["tokens_per_second"]
    return found


def test_every_recovery_is_here() -> None:
    assert {name for name, _ in CASES.values()} == set(available("pruning.recovery"))


@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_leaves_a_plain_model(case: str, tmp_path: Path) -> None:
    model = pruned()
    attributes, kind, before = set(vars(model)), type(model), copy.deepcopy(model)
    dense(), plan()  # made once, at random
    random_state = torch.get_rng_state()
    shown: list[tuple[int, dict[str, float]]] = []
    report = run(case, model, tmp_path, curves=lambda step, values: shown.append((step, dict(values))), max_steps=12)
    heldout = dict(report.curves["heldout_loss"])
    assert list(heldout) == [0, 2, 4, 6, 8, 10, 12]
    assert min(heldout.values()) == heldout[report.kept_step] < heldout[0]
    assert [step for step, _ in report.curves["train_loss"]] == list(range(1, 13))
    assert {"learning_rate", "grad_norm", "tokens_per_second"} <= set(report.curves)
    live = {name: tuple((step, values[name]) for step, values in shown if name in values) for name in report.curves}
    assert live == report.curves
    assert (type(model), set(vars(model)), model.training) == (kind, attributes, False)
    assert model.config.to_dict() == before.config.to_dict()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.is_activation_checkpointing
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.equal(logits(model), logits(before))


def killed_at_step_5(case: str, scratch: str) -> None:
    def kill(share: float, message: str) -> None:
        if message.startswith("step 5/"):
            kill_this_process()

    run(case, pruned(), Path(scratch), progress=kill)


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(case: str, tmp_path: Path) -> None:
    whole, scratch = pruned(), tmp_path / "scratch"
    expected = figures(run(case, whole, tmp_path / "whole"))
    code = exit_code(f"{__name__}:killed_at_step_5", case, str(scratch), imports=TRAINER)
    assert code == -signal.SIGKILL
    assert sorted(path.name for path in scratch.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (scratch / "checkpoint-6").mkdir()  # as if killed while the next one was being written
    damaged = scratch / "checkpoint-4" / "optimizer.pt"
    twin = tmp_path / "twin"
    subprocess.run(["cp", "-r", str(scratch), str(twin)], check=True)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for folder, first_step in ((twin, 5), (scratch, 3)):
        reported: list[str] = []
        resumed = pruned()
        report = run(case, resumed, folder, progress=lambda share, message, reported=reported: reported.append(message))
        steps = [message for message in reported if message.startswith("step")]
        assert steps[0].startswith(f"step {first_step}/6")
        assert figures(report) == expected
        assert same(resumed, whole)


class _Told(Exception):
    pass


@pytest.mark.parametrize("step", [1, 5])
def test_what_the_progress_raises_ends_the_training_with_a_checkpoint(step: int, tmp_path: Path) -> None:
    """An epoch has four steps, and a checkpoint is due after every other one: neither matters."""
    whole, model, scratch = pruned(), pruned(), tmp_path / "scratch"
    before = copy.deepcopy(model)
    expected = figures(run("lora", whole, tmp_path / "whole"))

    def tell(share: float, message: str) -> None:
        if message.startswith(f"step {step}/"):
            raise _Told(message)

    with pytest.raises(_Told, match=f"step {step}/6"):
        run("lora", model, scratch, progress=tell)
    assert same(model, before), "the model is as it was"
    assert (scratch / f"checkpoint-{step}" / MARKER).exists()
    reported: list[str] = []
    resumed = pruned()
    report = run("lora", resumed, scratch, progress=lambda share, message: reported.append(message))
    assert figures(report) == expected
    assert reported[0].startswith(f"step {step + 1}/6")
    assert same(resumed, whole)


@pytest.mark.parametrize("case", ["lora", "cpt"])
def test_scratch_of_another_run_is_not_taken(case: str, tmp_path: Path) -> None:
    run(case, pruned(), tmp_path, seed=1)
    fresh, after_other = pruned(), pruned()
    assert figures(run(case, after_other, tmp_path)) == figures(run(case, fresh, tmp_path / "fresh"))
    assert same(after_other, fresh)
    reported: list[str] = []
    again = pruned()
    run(case, again, tmp_path, progress=lambda share, message: reported.append(message))
    assert not [message for message in reported if message.startswith("step")]
    assert same(again, fresh)


@pytest.mark.parametrize("name", ["cpt", "distill", "lora"])
def test_a_watched_text_changes_nothing_and_its_loss_is_the_cross_entropy_in_nats(name: str, tmp_path: Path) -> None:
    watch = {"dataset": "other", "num_windows": 3, "seq_len": 20}
    model, unwatched = pruned(), pruned()
    report = run(name, model, tmp_path / "watched", watch=watch)
    others = run(name, unwatched, tmp_path / "not", watch=None)
    assert same(model, unwatched)
    seen = dict(report.curves["watched_loss"])
    assert list(seen) == list(dict(report.curves["heldout_loss"])) == [0, 2, 4, 6]
    left = {metric: points for metric, points in figures(report)["curves"].items() if metric != "watched_loss"}
    assert left == figures(others)["curves"]
    ids = tiny_tokenizer()("\n\n".join(watched()), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[:60]).view(3, 20)
    for step, weights in {0: pruned(), report.kept_step: model}.items():
        logits_NLV = weights(windows).logits[:, :-1].detach().float()
        by_hand = torch.nn.functional.cross_entropy(logits_NLV.flatten(0, 1), windows[:, 1:].flatten())
        assert seen[step] == pytest.approx(float(by_hand), rel=1e-5)


def test_what_no_longer_learns_ends_early_and_stays_ended(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 0.3, "patience": 1, "heldout_steps": 1, "max_steps": 30, "keep": "best"}
    model, again = pruned(), pruned()
    report = run("cpt", model, tmp_path, **options)
    assert report.num_steps < 30
    heldout = dict(report.curves["heldout_loss"])
    assert report.kept_step == min(heldout, key=lambda step: heldout[step])
    assert figures(run("cpt", again, tmp_path, **options)) == figures(report)
    assert same(again, model)


def test_a_loss_that_keeps_rising_is_refused_and_the_best_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"held-out loss rose from .* at step 2: lower .* the last good weights"):
        run("cpt", pruned(), tmp_path, learning_rate=10.0)
    assert list(tmp_path.glob("best-*/weights.safetensors"))


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["wholly-new"])
    module = load("pruning.recovery", "distill", "recovery")
    config = module.Config.model_validate({**COMMON, **CASES["distill"][1]})
    given = RecoveryInputs(texts, teacher=lambda: copy.deepcopy(dense()), teacher_tokenizer=lambda: other)
    with pytest.raises(PruningError, match="the teacher has another tokenizer: 'wholly-new' is token"):
        module.recover(pruned(), tiny_tokenizer(), given, config, TrainingRun(tmp_path))


@pytest.mark.parametrize(
    ("case", "options", "sentence"),
    [
        ("cpt", {"num_tokens": 23}, "num_tokens 23 is less than one window of seq_len 24"),
        ("cpt", {"num_tokens": 10_000_000}, "fewer than the 416666 windows and 2 held-out ones of seq_len 24"),
        ("cpt", {"num_heldout": 0}, "keep: best judges by held-out examples, and num_heldout is 0"),
        ("cpt", {"optimizer": "adamw_8bit"}, "optimizer adamw_8bit needs bitsandbytes and a CUDA device, and there is"),
        ("lora", {"final_learning_rate": 0.1, "schedule": "linear"}, "final_learning_rate 0.1 is where a cosine ends"),
        ("distill-cache", {"hidden_weight": 0.1}, "hidden_weight 0.1 needs the teacher's residual streams"),
        ("distill-cache", {"top_k": 10_000}, "top_k 10000 is more than the 320 tokens there are"),
        ("reconstruct", {"num_heldout": 3}, "the calibration holds out 2 windows"),
        (
            "lora",
            {"watch": {"dataset": "o", "num_windows": 999}},
            "watch: o has .* tokens, and 999 windows of 512",
        ),
        ("lora", {"num_examples": 15}, "num_examples is 17, but the data set has 16 records"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(
    case: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(case, pruned(), tmp_path, **options)


def test_modules_are_light() -> None:
    names = ", ".join(f"pruning.recovery.{name}" for name in available("pruning.recovery"))
    code = f"import sys, {names}; assert not {{'torch', 'transformers', 'peft', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
