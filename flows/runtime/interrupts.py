"""Ctrl-C, SIGTERM and SIGHUP: the first lets running stages come to an end, the second drops them; the same command
goes on either way.

After Ctrl-C running stages are finished. Who sends SIGTERM (a service manager) or closes the terminal (SIGHUP) does not
wait so long: a stage then ends as soon as it has saved what it can go on from.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from flows.runtime.environment import started_by_prefect

log = logging.getLogger("slimline")

#: seconds in which a deployed flow run takes another signal for the same one: a service manager tells every process at
#: once, and the runner tells its flow runs once more
_ECHO = 3.0
_KEPT = "finished ones are kept, the same command goes on from there"

_first: signal.Signals | None = None
_first_at = 0.0
_in_command = False


@contextmanager
def interruptible_command() -> Iterator[None]:
    """The body of a command that runs stages; a signal that ends it gives exit code 1.

    Two steps, since a stage in a thread cannot be stopped half-way, only waited for or dropped.
    """
    global _in_command
    _in_command = True
    handle_signals(_on_signal)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(1) from None


@contextmanager
def until_stopped() -> Iterator[None]:
    """The body of a command that serves until a signal ends it, with exit code 0; a second signal does not wait for the
    processes that end with this one anyway."""

    def end(number: int, frame: FrameType | None) -> None:
        handle_signals(lambda number, frame: exit_at_once("not waiting any longer"))
        log.info("ended by %s", signal.Signals(number).name)
        raise KeyboardInterrupt

    handle_signals(end)
    with suppress(KeyboardInterrupt):
        yield


def handle_later_signals(number: signal.Signals | None) -> None:
    """Handle what follows the first signal ourselves, within Prefect's engine too.

    number: of the first, if the engine handled it, so that nobody has said yet what it means.
    """
    if number is not None:
        _announce_first(number)
    if number is not None or _in_command:
        handle_signals(_on_signal)


def in_command() -> bool:
    """Whether this process is a command of ours, which ends by itself; else Prefect must hear of the signal."""
    return _in_command


def ends_soon() -> bool:
    """Whether running stages are to end before they are finished."""
    return _first not in (None, signal.SIGINT)


def exit_at_once(message: str) -> NoReturn:
    """End this process now, as safe as kill -9, which the store is built for; servers and other processes that it
    started see that and end too."""
    _print(message)
    os._exit(1)


def handle_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Set the handler of all three, in the main thread, which alone has some. After `nohup` SIGHUP stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _first is None:
        _announce_first(signal.Signals(number))
        raise KeyboardInterrupt
    if started_by_prefect() and time.monotonic() - _first_at < _ECHO:
        return
    exit_at_once("dropped what still ran")


def _announce_first(number: signal.Signals) -> None:
    global _first, _first_at
    _first, _first_at = number, time.monotonic()
    if number == signal.SIGINT:
        _print(f"interrupted; running stages are finished first (Ctrl-C again drops them), {_KEPT}")
    else:
        _print(
            f"ended by {number.name}; running stages end as soon as they can go on from there, a training after its "
            f"step and a pruning after its layer (a second signal drops them), {_KEPT}"
        )


def _print(message: str) -> None:
    with suppress(OSError):  # a terminal that is gone
        print(f"slimline: {message}", file=sys.stderr, flush=True)
