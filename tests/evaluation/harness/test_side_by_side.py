"""Suites of lm-eval's tasks in several threads of one process, as on several devices."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.harness import run_tasks as harness
from evaluation.inference import generate
from evaluation.inference.generate import generate_until
from evaluation.inference.options import EvalOptions
from evaluation.inference.prompts import PromptRule
from evaluation.suite import ModelFacts
from evaluation.suites import zero_shot
from tests.evaluation.local_data import LocalData, arc_rows, piqa_rows, write_data
from tests.tiny import tiny_model

TIMEOUT = 60
"""Seconds after which a thread that waits for another one is lost."""


@pytest.fixture
def data(tmp_path: Path) -> LocalData:
    trivia = [{"question": f"Who has {i} dogs", "answer": {"aliases": ["a fox", "e"]}} for i in range(4)]
    write_data(tmp_path, "baber/piqa", "plain_text", {"train": piqa_rows(6), "validation": piqa_rows(9)})
    write_data(tmp_path, "allenai/ai2_arc", "ARC-Easy", {split: arc_rows(7) for split in ("train", "test")})
    write_data(tmp_path, "mandarjoshi/trivia_qa", "rc.nocontext", {"train": trivia, "validation": trivia})
    return LocalData(tmp_path)


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """What each gives, all in threads of their own; the first error if there is one."""
    found: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            found[number] = works[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]
    return found


class PythonStream:
    """Python's generator as it stands. Others of the process draw a few numbers from it at any time (the jitter of
    Prefect's and MLflow's background threads): equal is what stands a few draws apart."""

    def __init__(self) -> None:
        self.state = random.getstate()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PythonStream):
            return NotImplemented
        return self.reaches(other) or other.reaches(self)

    __hash__ = None  # type: ignore[assignment]

    def reaches(self, other: PythonStream) -> bool:
        stream = random.Random()
        stream.setstate(self.state)
        for _ in range(1000):
            if stream.getstate() == other.state:
                return True
            stream.getrandbits(32)
        return False


def global_states() -> tuple[object, ...]:
    task = lm_eval.api.task
    levels = [logging.getLogger(name).level for name in ("lm_eval", "transformers.generation")]
    bars = task.tqdm, task.datasets.are_progress_bars_disabled()
    return PythonStream(), str(np.random.get_state()), torch.get_rng_state().tolist(), levels, bars


def suites(
    data: LocalData, tokenizer: PreTrainedTokenizerFast, configs: list[zero_shot.Config]
) -> list[Callable[[], Any]]:
    """Each with a model of its own."""
    models = [tiny_model("llama", seed=seed) for seed in range(len(configs))]
    return [
        lambda model=model, config=config: zero_shot.evaluate(model, tokenizer, data, config, EvalOptions(batch_size=2))
        for model, config in zip(models, configs, strict=True)
    ]


@pytest.mark.parametrize(
    "function, tasks",
    [("score_answers", (("piqa",), ("arc_easy", "piqa"))), ("generate_until", (("triviaqa",), ("triviaqa",)))],
)
def test_models_run_at_the_same_time_and_nothing_changes_by_it(
    function: str,
    tasks: tuple[tuple[str, ...], ...],
    tokenizer: PreTrainedTokenizerFast,
    data: LocalData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs = [zero_shot.Config(tasks=names, num_fewshot=2, limit=4) for names in tasks]
    works = suites(data, tokenizer, configs)
    alone = [work() for work in works]
    before = global_states()
    inside: list[tuple[object, ...]] = []
    answer, meeting = getattr(harness, function), threading.Barrier(2)

    def answered(*args: Any, **kwargs: Any) -> Any:
        meeting.wait(TIMEOUT)
        inside.append(global_states())
        meeting.wait(TIMEOUT)
        return answer(*args, **kwargs)

    monkeypatch.setattr(harness, function, answered)
    assert together(works) == alone
    assert inside == [before, before]
    assert global_states() == before


def test_one_loads_its_tasks_while_another_ones_model_runs(
    tokenizer: PreTrainedTokenizerFast, data: LocalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is told to score only when the second has come to its own scoring."""
    works = suites(data, tokenizer, [zero_shot.Config(tasks=("piqa",), num_fewshot=n) for n in (1, 2)])
    alone = [work() for work in works]
    score, first, second = harness.score_answers, threading.Event(), threading.Event()

    def scored(*args: Any, **kwargs: Any) -> Any:
        if first.is_set():
            second.set()
        first.set()
        assert second.wait(TIMEOUT)
        return score(*args, **kwargs)

    def later() -> Any:
        assert first.wait(TIMEOUT)
        return works[1]()

    monkeypatch.setattr(harness, "score_answers", scored)
    assert together([works[0], later]) == alone


def test_an_error_in_one_thread_does_not_block_the_others(tokenizer: PreTrainedTokenizerFast, data: LocalData) -> None:
    works = suites(data, tokenizer, [zero_shot.Config(tasks=("piqa",))])
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    before = global_states()
    with pytest.raises(EvaluationError, match="logits are NaN"):
        zero_shot.evaluate(broken, tokenizer, data, zero_shot.Config(tasks=("arc_easy",)))
    assert global_states() == before
    assert together(works) == [works[0]()]


def test_sampled_answers_of_two_threads_are_those_of_one(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"do_sample": True, "temperature": 0.8, "max_gen_toks": 8}
    requests = [(f"The fox saw {n} dogs", settings) for n in range(4)]
    models = [tiny_model("llama", seed=seed) for seed in range(2)]
    for model in models:
        # another thread gets its chance at every token
        model.register_forward_hook(lambda *_: time.sleep(0.001))
    works: list[Callable[[], Any]] = [
        lambda model=model: generate_until(model, tokenizer, requests, PromptRule(200)) for model in models
    ]
    alone = [work() for work in works]
    before = global_states()
    assert together(works) == alone
    assert global_states() == before


def test_a_sampled_answer_is_drawn_by_its_seed_on_every_device_of_a_spread_model(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(generate, "torch_seed", lambda *given: asked.append(given) or nullcontext())

    class Spread:
        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    places = ("cuda:1", "cuda:1", "cuda:0", "cpu")
    monkeypatch.setattr(model, "parameters", lambda: iter([Spread(place) for place in places]))
    monkeypatch.setattr(type(model), "device", torch.device("cpu"))
    generate_until(
        model, tokenizer, [("The fox", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 2})], PromptRule(50)
    )
    assert [[str(device) for device in devices] for _, devices in asked] == [["cuda:1", "cuda:0"]]


def test_generators_of_devices_are_left_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all CUDA devices were seeded"))
    zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa",), num_fewshot=1))


def test_lm_eval_begins_with_its_default_seeds(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = harness.write_overlays, []

    def written(*args: Any, **kwargs: Any) -> None:
        seen.append(global_states()[:4])
        write(*args, **kwargs)

    monkeypatch.setattr(harness, "write_overlays", written)
    zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa",)))
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    expected = global_states()[:3]
    assert [state[:3] for state in seen] == [expected]
    assert seen[0][3][0] == logging.ERROR


def test_cut_few_shot_prompts_are_told_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData, caplog: pytest.LogCaptureFixture
) -> None:
    config = zero_shot.Config(tasks=("piqa", "arc_easy"), num_fewshot=2, limit=2)
    with caplog.at_level(logging.WARNING, "slimline"):
        zero_shot.evaluate(model, tokenizer, data, config)
        assert caplog.messages == []
        model.config.max_position_embeddings = 60
        report = zero_shot.evaluate(model, tokenizer, data, config).report
    count = report.protocol["truncated_requests"]
    assert count == 12
    assert caplog.messages == [
        f"{count} requests did not fit into the model's context of 60 tokens, and their prompts lost the beginning; "
        "take fewer than 2 few-shot examples"
    ]


@pytest.mark.parametrize(
    "task, context, tokens",
    [("triviaqa", 257, 256), ("gsm8k_cot", 200, 256), ("coqa", 200, 256), ("ifeval", 1024, 1280)],
)
def test_an_answer_that_leaves_no_room_is_refused_at_once(task: str, context: int, tokens: int) -> None:
    config = zero_shot.Config(tasks=("piqa", task))
    wanted = f"'{task}' writes {tokens} tokens, which leaves no room for a prompt in {context}"
    with pytest.raises(EvaluationError, match=wanted):
        zero_shot.check_model(config, ModelFacts(max_position_embeddings=context))


def test_an_answer_that_fits_is_not_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    zero_shot.check_model(zero_shot.Config(tasks=("triviaqa",)), ModelFacts(258))
    zero_shot.check_model(zero_shot.Config(tasks=("triviaqa",)), ModelFacts())
    zero_shot.check_model(zero_shot.Config(), ModelFacts(16))
    model.config.max_position_embeddings = 128
    with pytest.raises(EvaluationError, match="'triviaqa' writes 256 tokens"):
        zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa", "triviaqa")))
