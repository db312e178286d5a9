"""A walk in several processes: they share the samples, the parent hears of progress and errors, nobody stays behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.artifacts.store import ArtifactRef
from infra.settings import Settings
from infra.sources.find import Sources
from pruning.errors import PruningError
from pruning.walk.options import WalkOptions
from tasks.devices.placement import Placement
from tasks.execution.context import RunContext, StageContext
from tasks.execution.curves import Curves
from tasks.stages.walk_processes import run_walk

pytestmark = pytest.mark.slow  # not in `make test-fast`

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Count:
    """Each process writes what it was given; the sum over the team is everybody's."""

    folder: Path

    def __call__(self, options: WalkOptions, progress: Tell, curves: Curves) -> None:
        process_group = options.process_group
        progress(0.5, "half")
        (total,) = process_group.sum_of(process_group.rank + 1)
        seen = f"{process_group.rank} of {process_group.size}: {total:g}, "
        seen += f"{options.batch_size}, {options.activation_budget_bytes}"
        (self.folder / str(process_group.rank)).write_text(f"{seen}, {os.getpid() != os.getppid()}", encoding="utf-8")
        progress(1.0, "done")
        curves(3, {"mlp_error": 0.25}, "layers")


class Refuse:
    """The leader finds fault."""

    def __call__(self, options: WalkOptions, progress: Tell, curves: Curves) -> None:
        def fail() -> None:
            raise PruningError("sparsity 2 is too much; lower it")

        options.process_group.decide(fail)


class Die:
    """One process is killed, as by the kernel when memory is short; the other one waits for it."""

    def __call__(self, options: WalkOptions, progress: Tell, curves: Curves) -> None:
        if options.process_group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        options.process_group.sum_of(1.0)


class Unpicklable(Exception):
    """Its arguments cannot be sent to another process."""

    def __init__(self, message: str) -> None:
        super().__init__(message, lambda: None)


class NotRebuilt(Exception):
    """It is sent, but cannot be made again from what was sent."""

    def __init__(self, message: str, *, needed: int) -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Raise:
    """One process fails with an error of a library that knows nothing of pickle; the other one waits for it."""

    error: type[Exception]

    def __call__(self, options: WalkOptions, progress: Tell, curves: Curves) -> None:
        if options.process_group.rank == 1:
            raise (
                self.error("the kernel image is broken")
                if self.error is Unpicklable
                else NotRebuilt("the kernel image is broken", needed=1)
            )
        options.process_group.sum_of(1.0)


class EndInSilence:
    """One process ends as if all were well and says nothing."""

    def __call__(self, options: WalkOptions, progress: Tell, curves: Curves) -> None:
        os._exit(0)


def context(home: Path, told: list[Any], **settings: Any) -> StageContext:
    chosen = Settings(home=home, device="cpu", **settings)
    sources = Sources((), None, hub=False, home=home)
    tell: Tell = lambda share, message: told.append((share, message))  # noqa: E731
    shown = lambda step, values, section="training": told.append((step, values, section))  # noqa: E731
    ref = ArtifactRef(kind="statistics", key="capture-v1-0")
    return StageContext(RunContext(chosen, sources), home, ref, Placement(torch.device("cpu")), tell, shown)


@pytest.mark.parametrize("size", [1, 2])
def test_each_process_has_its_share_and_the_leader_is_heard(size: int, tmp_path: Path) -> None:
    told: list[Any] = []
    settings = {"walk_processes": size, "walk_batch_size": 3, "activation_budget_gib": 0.5}
    run_walk(context(tmp_path, told, **settings), Count(tmp_path))
    total = {1: 1, 2: 3}[size]
    for rank in range(size):
        assert (tmp_path / str(rank)).read_text(encoding="utf-8") == f"{rank} of {size}: {total}, 3, {2**29}, True"
    assert told == [(0.5, "half"), (1.0, "done"), (3, {"mlp_error": 0.25}, "layers")]


@pytest.mark.usefixtures("forked")
def test_the_leaders_error_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="sparsity 2 is too much; lower it"):
        run_walk(context(tmp_path, [], walk_processes=2), Refuse())


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("error", [Unpicklable, NotRebuilt])
def test_an_error_that_cannot_be_pickled_is_raised_in_words(error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"{error.__name__}: .*the kernel image is broken"):
        run_walk(context(tmp_path, [], walk_processes=2), Raise(error))


@pytest.mark.usefixtures("forked")
def test_processes_that_end_in_silence_end_the_walk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended before the walk was done"):
        run_walk(context(tmp_path, [], walk_processes=2), EndInSilence())


@pytest.mark.usefixtures("forked")
def test_a_killed_process_ends_the_walk_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"died \(exit code -9\).*run again to go on"):
        run_walk(context(tmp_path, [], walk_processes=2), Die())
