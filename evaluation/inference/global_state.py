"""State that all threads of a process share (random generators, levels of logs, switches of libraries), set for a while
and put back.

Suites run side by side in threads. What only one thread at a time may set is set in a critical section, which is short:
no forward pass belongs in one, unless it draws.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

_exclusive = threading.Lock()
_counting = threading.Lock()
_inside: Counter[str] = Counter()
_levels: dict[str, int] = {}


@dataclass
class Setting:
    """Something global: how it is read and written, and its value in the critical sections of one owner."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    own: Any


def seeded_generators(*, python: int, numpy: int, torch_cpu: int) -> list[Setting]:
    """The generators of the CPU as `random.seed`, `numpy.random.seed` and `torch.manual_seed` leave them. Those of
    other devices are not touched: another thread may draw from them."""
    generator = torch.Generator().manual_seed(torch_cpu)
    return [
        Setting(random.getstate, random.setstate, random.Random(python).getstate()),
        Setting(np.random.get_state, np.random.set_state, np.random.RandomState(numpy).get_state()),
        Setting(torch.get_rng_state, torch.set_rng_state, generator.get_state()),
    ]


class ExclusiveGlobals:
    """A context manager, inside a critical section in which the settings have the owner's values; outside they are as
    they were before. The owner's values last: the next section goes on with what the one before left."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = settings
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        _exclusive.acquire()
        self._before = [setting.read() for setting in self._settings]
        for setting in self._settings:
            setting.write(setting.own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        for setting, before in zip(self._settings, self._before, strict=True):
            setting.own = setting.read()
            setting.write(before)
        self._before = None
        _exclusive.release()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Outside of the section while the block runs, and in it again afterwards; after an error not."""
        self.__exit__(None, None, None)
        yield
        self.__enter__()


@contextlib.contextmanager
def torch_seed(seed: int, devices: Sequence[torch.device]) -> Iterator[None]:
    """A critical section in which torch draws by the seed, on the CPU and on these CUDA devices; as before outside."""
    with _exclusive, torch.random.fork_rng(devices=devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """torch computes in so many threads while the block runs, then in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet_logger(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Nothing below the level from the logger of that name, as long as any thread is inside. A logger that says less
    already is left as it is."""
    logger = logging.getLogger(name)
    with _counting:
        if not _inside[name]:
            _levels[name] = logger.level
        _inside[name] += 1
        logger.setLevel(max(level, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        with _counting:
            _inside[name] -= 1
            if not _inside[name]:
                logger.setLevel(_levels[name])
