"""What is called compiled runs compiled, however many profiles the process took before. No inductor: graphs run as they
were traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from evaluation.errors import EvaluationError
from evaluation.profile import compilation as compiling
from evaluation.profile import profiler
from evaluation.profile.config import ProfileConfig
from evaluation.profile.profiler import profile
from evaluation.profile.timed_generation import Runner
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from tests.tiny import random_plan, tiny_model

CONFIG = ProfileConfig(batch_size=[1, 8], prompt_len=12, new_tokens=4, warmup=1, runs=1, ratio_seconds=0, compile=True)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many forward passes ran "compiled" and how many "eager"."""
    tally, graphs, real_compile, real_runner = Counter[str](), [0], torch.compile, profiler.runner_of

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            graphs[0] += 1
            return graph.forward(*given)

        return run

    def counted_runner(model: PreTrainedModel, *, compiled: bool) -> Runner:
        runner = real_runner(model, compiled=compiled)

        def forward(**given: Any) -> Any:
            before, found = graphs[0], runner.forward(**given)
            tally["compiled" if graphs[0] > before else "eager"] += 1
            return found

        return Runner(model, forward)

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: real_compile(model, dynamic=dynamic, backend=backend))
    monkeypatch.setattr(profiler, "runner_of", counted_runner)
    torch._dynamo.reset()
    return tally


def pruned(seed: int) -> PreTrainedModel:
    model = tiny_model("llama", layers=1)
    shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=seed, drop=0))
    return model.eval()


@pytest.mark.long  # Dynamo traces some twenty graphs
def test_a_third_profile_of_a_process_is_compiled_too(calls: Counter[str]) -> None:
    dense = tiny_model("llama", layers=1)
    profile(dense, CONFIG)
    for seed in range(2):
        profile(pruned(seed), CONFIG, reference=tiny_model("llama", layers=1))
    assert calls["compiled"] > 0
    assert calls["eager"] == 0


@pytest.mark.slow  # Dynamo traces three graphs
def test_too_many_graphs_are_an_error_and_not_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_MOST_GRAPHS", 2)
    with pytest.raises(EvaluationError, match=r"compile: true.*more than 2 .*compile: false"):
        profile(tiny_model("llama", layers=1), CONFIG)
    assert torch._dynamo.config.fail_on_recompile_limit_hit is False
    assert torch._dynamo.config.recompile_limit == 8
