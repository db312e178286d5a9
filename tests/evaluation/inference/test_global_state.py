from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.inference.global_state import ExclusiveGlobals, Setting, quiet_logger, seeded_generators, torch_seed


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def expected(*, python: int, others: int, count: int) -> list[tuple[float, float, float]]:
    """What is drawn after the global generators are seeded; they stay as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(python)
    np.random.seed(others)
    torch.manual_seed(others)
    found = [drawn() for _ in range(count)]
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    return found


def test_a_section_goes_on_where_the_last_one_ended() -> None:
    inside, outside = expected(python=0, others=1234, count=3), expected(python=7, others=8, count=3)
    random.seed(7)
    np.random.seed(8)
    torch.manual_seed(8)
    globals_ = ExclusiveGlobals(seeded_generators(python=0, numpy=1234, torch_cpu=1234))
    found_outside = [drawn()]
    with globals_:
        found = [drawn()]
        with globals_.released():
            found_outside.append(drawn())
        found.append(drawn())
    found_outside.append(drawn())
    with globals_:
        found.append(drawn())
    assert (found, found_outside) == (inside, outside)


def test_an_error_ends_the_section_wherever_it_happens() -> None:
    values = {"x": "everybody's"}
    globals_ = ExclusiveGlobals([Setting(lambda: values["x"], lambda value: values.update(x=value), "mine")])
    with pytest.raises(KeyError), globals_:
        fail(values, "mine")
    assert values == {"x": "everybody's"}
    with pytest.raises(KeyError), globals_, globals_.released():
        fail(values, "everybody's")
    assert values == {"x": "everybody's"}
    with globals_:  # nobody has kept it
        assert values == {"x": "mine"}


def fail(values: dict[str, str], expected: str) -> None:
    assert values == {"x": expected}
    raise KeyError


def test_threads_enter_one_after_the_other_and_see_nothing_of_each_other() -> None:
    """Of a generator of the test's own: threads that servers' clients left behind draw from the global one."""
    shared = random.Random(7)
    before, own = shared.getstate(), random.Random(3).getstate()
    found: dict[int, list[float]] = {}
    having: list[int] = []

    def draw(number: int) -> None:
        globals_ = ExclusiveGlobals([Setting(shared.getstate, shared.setstate, own)])
        for _ in range(30):
            with globals_:
                having.append(number)
                time.sleep(0.0005)
                found.setdefault(number, []).append(shared.random())
                assert having == [number]
                having.clear()

    in_threads(draw, 3)
    alone = random.Random(3)
    inside = [alone.random() for _ in range(30)]
    assert found == dict.fromkeys(range(3), inside)
    assert shared.getstate() == before


def in_threads(work: Any, count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_only_the_generators_that_are_asked_for_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host of three CUDA devices: a training on the third must not find its generator elsewhere."""
    asked: list[Any] = []

    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        asked.append(str(device))
        yield

    @contextmanager
    def fork_rng(devices: Any, device_type: str) -> Iterator[None]:
        asked.append([str(each) for each in devices])
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "manual_seed", asked.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all devices were seeded"))
    before = torch.get_rng_state()
    with torch_seed(5, [torch.device("cuda:0"), torch.device("cuda:1")]):
        first = float(torch.rand(()))
    torch.set_rng_state(before)
    assert asked == [["cuda:0", "cuda:1"], "cuda:0", 5, "cuda:1", 5]
    assert first == float(torch.rand((), generator=torch.Generator().manual_seed(5)))
    with ExclusiveGlobals(seeded_generators(python=0, numpy=0, torch_cpu=0)):
        pass


def test_a_logger_is_quiet_until_the_last_one_leaves() -> None:
    logger = logging.getLogger("slimline.tests.quiet")
    logger.setLevel(logging.INFO)
    first, second = quiet_logger(logger.name), quiet_logger(logger.name)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.ERROR
    second.__exit__(None, None, None)
    assert logger.level == logging.INFO


@pytest.mark.parametrize("level, parents", [(logging.CRITICAL, logging.INFO), (logging.NOTSET, logging.CRITICAL)])
def test_a_logger_that_says_less_already_is_left_so(level: int, parents: int) -> None:
    parent, logger = logging.getLogger("slimline.tests.loud"), logging.getLogger("slimline.tests.loud.quiet")
    parent.setLevel(parents)
    logger.setLevel(level)
    with quiet_logger(logger.name):
        assert not logger.isEnabledFor(logging.ERROR)
    assert logger.level == level
