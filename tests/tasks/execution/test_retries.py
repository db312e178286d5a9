"""Tried again: what passes by itself, after growing pauses, in smaller batches when memory was short. Nothing else."""

from __future__ import annotations

import errno
import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from prefect.client.schemas.objects import State

from infra.errors import DiskFull, SourceInvalid, SourceMissing
from infra.hub import Unreachable
from infra.settings import Settings
from infra.sources.find import Sources
from pruning.errors import MemoryPart, memory_for
from tasks.execution.context import RunContext, StageContext
from tasks.execution.retries import retry_options
from tasks.execution.stage import stage
from tasks.execution.transient import Passing, passing
from tasks.requests import CaptureRequest
from tests.tasks.execution.test_stage import REQUEST


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.test/x")))


def wrapped(outer: Exception, cause: BaseException) -> Exception:
    outer.__cause__ = cause
    return outer


PASSING: list[tuple[BaseException, Passing]] = [
    (ConnectionResetError(), "network"),
    (TimeoutError(), "network"),
    (httpx.ConnectError("no route"), "network"),
    (httpx.ReadTimeout("slow"), "network"),
    (requests.ConnectionError("dropped"), "network"),
    (OSError(errno.ENETUNREACH, "unreachable"), "network"),
    (answered(429), "network"),
    (answered(503), "network"),
    (Unreachable("the hub did not answer"), "network"),
    (wrapped(SourceMissing("the hub did not answer"), ConnectionError("dropped")), "network"),
    (wrapped(SourceInvalid("cannot be read"), wrapped(OSError("x"), requests.Timeout("slow"))), "network"),
    (LocalEntryNotFoundError("no connection, and not in the cache"), "network"),
    (MemoryError(), "memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "memory"),
    (RuntimeError("a process of the walk died (exit code -9), perhaps out of memory; run again to go on"), "memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
]
LASTING: list[BaseException] = [
    ValueError("sparsity 2"),
    SourceMissing("not found in the mirror"),
    wrapped(SourceMissing("the hub knows no such model"), answered(404)),
    answered(401),
    wrapped(Unreachable("the hub did not answer"), OfflineModeIsEnabled("HF_HUB_OFFLINE=1")),
    wrapped(requests.ConnectionError("x"), ssl.SSLCertVerificationError("self-signed")),
    wrapped(DiskFull("full"), OSError(errno.ENOSPC, "No space left on device")),
    RuntimeError("a process of the walk died (exit code 1); run again to go on"),
    FileNotFoundError("plan.json"),
]


@pytest.mark.parametrize(("error", "kind"), PASSING, ids=lambda value: repr(value)[:40])
def test_what_passes_by_itself(error: BaseException, kind: Passing) -> None:
    assert passing(error) == kind


@pytest.mark.parametrize("error", LASTING, ids=lambda value: repr(value)[:40])
def test_what_does_not(error: BaseException) -> None:
    assert passing(error) is None


class Tries:
    """A fill that fails in the given ways first, and notes when and with which batches it was tried."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.times: list[float] = []
        self.batches: list[tuple[int, int | str]] = []
        self.budgets: list[float | None] = []

    def __call__(self, request: CaptureRequest, context: StageContext) -> None:
        settings = context.run_context.settings
        self.times.append(time.monotonic())
        self.batches.append((settings.walk_batch_size, settings.eval_batch_size))
        self.budgets.append(settings.device_activation_budget_gib)
        if self.failures:
            raise self.failures.pop(0)
        (context.folder / "answer.txt").write_text("42", encoding="utf-8")

    @property
    def pauses(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@pytest.fixture
def attempt(prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tries], State[Any]]:
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path / "home"))
    settings = Settings(device="cpu", retries=3, retry_delay=0.2, walk_batch_size=2, eval_batch_size=8)
    run_context = RunContext(settings, Sources((), None, False, home=settings.home))

    def run(tries: Tries) -> State[Any]:
        task = stage("capture", tries, devices="none", imports=()).with_options(**retry_options(settings))
        return task(REQUEST, "capture", run_context, return_state=True)

    return run


def test_a_dropped_network_is_tried_again_after_growing_pauses(
    attempt: Callable[[Tries], State[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    tries = Tries(ConnectionResetError("dropped"), Unreachable("the hub did not answer"))
    with caplog.at_level(logging.WARNING, "slimline"):
        assert attempt(tries).is_completed()
    assert len(tries.times) == 3
    assert 0.1 < tries.pauses[0] < tries.pauses[1]
    assert tries.batches == [(2, 8)] * 3
    assert "capture: the network failed: dropped; tried again after a pause (1 of 3)" in caplog.text


def test_short_of_memory_it_is_tried_with_smaller_batches(attempt: Callable[[Tries], State[Any]]) -> None:
    tries = Tries(MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), MemoryError())
    assert attempt(tries).is_completed()
    assert tries.batches == [(2, 8), (1, 4), (1, 2), (1, 1)]


def short_in(part: MemoryPart) -> Exception:
    with pytest.raises(torch.OutOfMemoryError) as raised, memory_for(part):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return raised.value


def test_a_part_that_batches_do_not_help_gets_room_on_the_device(attempt: Callable[[Tries], State[Any]]) -> None:
    tries = Tries(short_in("solving"), short_in("the forward"), short_in("loading"))
    assert attempt(tries).is_completed()
    assert tries.batches == [(2, 8), (2, 8), (1, 4), (1, 4)]
    assert tries.budgets == [None, 0, 0, 0]


def test_an_error_of_the_user_is_not_tried_again(attempt: Callable[[Tries], State[Any]]) -> None:
    tries = Tries(SourceInvalid("no column 'txt'"))
    state = attempt(tries)
    assert state.is_failed()
    assert isinstance(state.result(raise_on_failure=False), SourceInvalid)
    assert len(tries.times) == 1


def test_tries_end(attempt: Callable[[Tries], State[Any]]) -> None:
    tries = Tries(*(ConnectionResetError("dropped") for _ in range(9)))
    assert attempt(tries).is_failed()
    assert len(tries.times) == 4


def test_no_retries_asked_for_are_none() -> None:
    assert retry_options(Settings(retries=0))["retries"] == 0
    assert retry_options(Settings(retries=4, retry_delay=5))["retry_delay_seconds"] == [5, 10, 20, 40]
