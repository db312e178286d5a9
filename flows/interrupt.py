"""Ctrl-C: the first lets running stages finish, the second ends the process; the same command goes on either way."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_interrupted = False


def take_interrupts() -> None:
    """Handle SIGINT in two steps. A stage in a thread cannot be stopped half-way, only waited for or dropped."""
    signal.signal(signal.SIGINT, _on_interrupt)


def shield_server() -> None:
    """Start Prefect's temporary server, where there is no other, so that Ctrl-C in the terminal does not reach it.

    A terminal interrupts all of its processes, and stages that finish need the server as much as the record does.
    Raises PrefectUnusable if there is none that answers and none can be started.
    """
    from flows.prefect_access import reach_prefect

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits what is blocked
    try:
        reach_prefect()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    if _interrupted:
        os._exit(1)  # as safe as kill -9, which the store is built for
    _interrupted = True
    print(
        "slimline: interrupted; running stages are finished first (Ctrl-C again drops them), finished ones are kept, "
        "the same command goes on from there",
        file=sys.stderr,
        flush=True,
    )
    raise KeyboardInterrupt
