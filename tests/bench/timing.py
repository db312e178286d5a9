"""Clocks and bars: what is timed is finished on its device, and a terminal sees how far it is."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pruning.families import family_of

log = logging.getLogger("slimline.bench")

Progress = Callable[[float, str], None]
StageResult = TypeVar("Made")


def seconds(work: Callable[[], StageResult], device: str) -> tuple[StageResult, float]:
    """What `work` returns and the wall time it took, with everything that was queued on the device."""
    _wait(device)
    start = time.perf_counter()
    value = work()
    _wait(device)
    return value, time.perf_counter() - start


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, input_ids_NL: Tensor, *, batch_size: int, device: str) -> float:
    """One plain forward of the decoder layers over all windows: embeddings in, no head, no KV cache.

    The model must be on the device already.
    """
    decoder = family_of(model).decoder(model)

    def work() -> None:
        for batch_BL in torch.split(input_ids_NL, batch_size):
            decoder(input_ids=batch_BL.to(device), use_cache=False)

    return seconds(work, device)[1]


@contextmanager
def bar(title: str) -> Iterator[Progress]:
    """A bar in a terminal, a line in the log at the end everywhere."""
    form = "{l_bar}{bar}| {postfix}"
    drawn = tqdm(total=100, desc=title, file=sys.stderr, disable=None, leave=False, bar_format=form)
    start = time.perf_counter()

    def report(share: float, message: str) -> None:
        drawn.set_postfix_str(message, refresh=False)
        drawn.n = min(100.0, 100 * share)
        drawn.refresh()

    try:
        yield report
    finally:
        drawn.close()
    log.info("%s: %.1f s", title, time.perf_counter() - start)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
