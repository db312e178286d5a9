"""How a process that computes for another one ends: the layer walk's and the copies of a model in an evaluation."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Called in the child: Ctrl-C is the parent's affair, and when the parent is gone, however it went, so is this."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
