"""What is minimised, against the same written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.errors import PruningError
from pruning.plan import PruningPlan
from pruning.recovery import RecoveryInputs
from pruning.recovery._session import check_tokenizers, layer_pairs
from pruning.training.batches import IGNORED, Batch, Numbered, collate
from pruning.training.objectives import CrossEntropy, Distillation, fill_cache, in_memory
from tests.pruning.checkpoints.test_surgery import plan_for
from tests.tiny import tiny_model, tiny_tokenizer


def example(seed: int, length: int, num_prompt: int) -> Batch:
    ids = torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:num_prompt] = IGNORED
    return {"input_ids": ids, "labels": labels}


EXAMPLES = [example(0, 9, 3), example(1, 14, 5), example(2, 6, 1)]


def predictions(model: Any) -> list[tuple[Tensor, int, list[Tensor]]]:
    """(log-probabilities, label, residual streams) of every predicted token, one example at a time."""
    found = []
    for each in EXAMPLES:
        outputs = model(each["input_ids"][None], output_hidden_states=True, use_cache=False)
        for place in range(1, len(each["input_ids"])):
            if each["labels"][place] != IGNORED:
                streams = [stream[0, place - 1] for stream in outputs.hidden_states]
                found.append((outputs.logits[0, place - 1], int(each["labels"][place]), streams))
    return found


def test_cross_entropy_counts_responses_and_no_padding() -> None:
    model = tiny_model("llama")
    expected = sum(-F.log_softmax(logits, -1)[label] for logits, label, _ in predictions(model))
    torch.testing.assert_close(CrossEntropy()(model, collate(0)(EXAMPLES)), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation(temperature: float) -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    pairs = ((1, 1), (3, 2))
    objective = Distillation(in_memory(teacher, autocast=False), 0.3, 0.7, temperature, pairs)
    own, theirs = predictions(student), predictions(teacher)
    expected = torch.zeros(())
    for (mine, label, _), (target, _, _) in zip(own, theirs, strict=True):
        soft = F.softmax(target / temperature, -1)
        kl = (soft * (soft.log() - F.log_softmax(mine / temperature, -1))).sum()
        expected = expected + 0.7 * temperature**2 * kl - 0.3 * F.log_softmax(mine, -1)[label]
    for a, b in pairs:
        energy = torch.stack([streams[b] for *_, streams in theirs]).square().mean()
        for (*_, mine_streams), (*_, their_streams) in zip(own, theirs, strict=True):
            expected = expected + 0.7 * (mine_streams[a] - their_streams[b]).square().mean() / energy / len(pairs)
    torch.testing.assert_close(objective(student, collate(0)(EXAMPLES)), expected, rtol=1e-4, atol=1e-4)


def cached(folder: Path, load: Callable[[], Any], top_k: int, **options: Any) -> Any:
    asked: dict[str, Any] = {"temperature": 2.0, "batch_size": 2, "pad_id": 0, "autocast": False, "identity": "x"}
    return fill_cache(load, EXAMPLES, top_k=top_k, device=torch.device("cpu"), folder=folder, **(asked | options))


def test_a_cache_of_all_tokens_is_the_teacher_and_of_fewer_a_lower_bound(tmp_path: Path) -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    batch = collate(0)([Numbered(EXAMPLES)[index] for index in (2, 0, 1)])
    exact = Distillation(in_memory(teacher, autocast=False), temperature=2.0)(student, batch)
    values = []
    for top_k in (5, 50, 320):
        cache = cached(tmp_path / str(top_k), lambda: copy.deepcopy(teacher), top_k)
        values.append(float(Distillation(cache.look, temperature=2.0)(student, batch)))
    assert values[0] < values[1] < values[2] + 0.05
    assert values[2] == pytest.approx(float(exact), rel=2e-3)


def test_a_killed_cache_goes_on_and_a_whole_one_needs_no_teacher(tmp_path: Path) -> None:
    teacher = tiny_model("llama", seed=5)

    class Killed(Exception):
        pass

    def stop(share: float, words: str) -> None:
        raise Killed(words)

    with pytest.raises(Killed, match="teacher, 2 of 3 examples"):
        cached(tmp_path, lambda: copy.deepcopy(teacher), 20, progress=stop)
    cached(tmp_path, lambda: copy.deepcopy(teacher), 20)

    def no_teacher() -> Any:
        raise AssertionError("it is not needed")

    whole = cached(tmp_path, no_teacher, 20)
    fresh = cached(tmp_path / "fresh", lambda: copy.deepcopy(teacher), 20)
    assert (whole.ids == fresh.ids).all()
    assert (whole.log_probs == fresh.log_probs).all()


def test_layers_correspond_to_what_the_next_kept_layer_is_given() -> None:
    full = plan_for(tiny_model("llama", layers=6))
    plan = PruningPlan(source=tiny_shapes(), head_dim=4, layers=tuple(full_layers(full)[index] for index in (0, 1, 4)))
    assert layer_pairs(RecoveryInputs(plan=plan), 3, 6) == ((1, 1), (2, 4), (3, 6))
    assert layer_pairs(RecoveryInputs(), 2, 2) == ((1, 1), (2, 2))
    with pytest.raises(PruningError, match="the model has 3 layers, the teacher 6: leave it out"):
        layer_pairs(RecoveryInputs(), 3, 6)


def tiny_shapes() -> Any:
    return plan_for(tiny_model("llama", layers=6)).source


def full_layers(plan: PruningPlan) -> Any:
    return PruningPlan.full(plan.source, plan.head_dim).layers


def test_equal_tokenizers_pass() -> None:
    check_tokenizers(tiny_tokenizer(), tiny_tokenizer())


@pytest.mark.parametrize("name", ["cross entropy", "memory", "hard", "cache"])
def test_gradients_are_those_of_finite_differences(name: str, tmp_path: Path) -> None:
    student, teacher = tiny_model("llama").double(), tiny_model("llama", seed=5)
    batch = collate(0)([Numbered(EXAMPLES)[index] for index in range(3)])
    objectives: dict[str, Any] = {
        "cross entropy": CrossEntropy(),
        "memory": Distillation(in_memory(teacher, autocast=False)),
        "hard": Distillation(in_memory(teacher, autocast=False), hard_weight=0.4, temperature=2.0),
        "cache": Distillation(cached(tmp_path, lambda: copy.deepcopy(teacher), 30).look, temperature=2.0),
    }
    objective, weight = objectives[name], student.lm_head.weight
    (2.0 * objective(student, batch)).backward()
    gradient, step = weight.grad.clone(), 1e-2
    for row, column in ((7, 3), (100, 20), (int(EXAMPLES[1]["input_ids"][8]), 0)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[row, column] += sign * step
                values.append(2.0 * objective(student, batch).double())
                weight[row, column] -= sign * step
        assert float(gradient[row, column]) == pytest.approx(
            float(values[0] - values[1]) / (2 * step), rel=0.02, abs=2e-3
        )
