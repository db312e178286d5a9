"""The module of the pretended device, as torch.cuda is of CUDA: streams on which everything has already happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.pretended.counts import count_wait


class Event:
    """After which nothing is pending."""

    def synchronize(self) -> None:
        count_wait("event")


class Stream:
    """In order with all others."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def record_event(self) -> Event:
        return Event()

    def synchronize(self) -> None:
        count_wait("stream")


class Runtime:
    """What torch.get_device_module gives. free_bytes: what `mem_get_info` says."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.available, self.free_bytes = False, 2**34
        self._current = Stream()

    def is_initialized(self) -> bool:
        return self.available

    def is_available(self) -> bool:
        return self.available

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return int(self.available)

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def current_stream(self, device: Any = None) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def synchronize(self, device: Any = None) -> None:
        count_wait("device")

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.free_bytes, self.free_bytes

    def memory_reserved(self, device: Any = None) -> int:
        return 0

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]
