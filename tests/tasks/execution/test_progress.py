"""Progress outside of Prefect: a bar in a terminal, nothing in a log file. (Inside: flows/run/test_compress.py.)"""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm

from tasks.execution.progress import settle_bars, stage_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with stage_progress("prune:x") as tell:
        tell(0.5, "layer 2 of 4")
        tell(1.7, "more than all")
    shown = terminal.getvalue()
    assert "prune:x" in shown
    assert " 50%" in shown
    assert "layer 2 of 4" in shown
    assert "100%" in shown
    assert "170%" not in shown


def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with stage_progress("prune:x") as tell:
        tell(0.5, "half")
    assert file.getvalue() == ""


def test_a_failure_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(RuntimeError, match="inside"), stage_progress("prune:x"):
        raise RuntimeError("inside")


def test_a_server_that_is_gone_does_not_end_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object, **named: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr("tasks.execution.progress.TaskRunContext.get", lambda: object())
    monkeypatch.setattr("tasks.execution.progress.create_progress_artifact", gone)
    monkeypatch.setattr("tasks.execution.progress.update_progress_artifact", gone)
    with stage_progress("prune:x") as tell:
        tell(0.5, "half")


def test_the_lock_of_bars_stays_when_libraries_have_used_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by `make chaos`: two cells of a night failed with "type object 'tqdm' has no attribute '_lock'"."""
    from tqdm.contrib.concurrent import ensure_lock

    monkeypatch.delattr(tqdm, "_lock", raising=False)
    settle_bars()
    with ensure_lock(tqdm):
        pass
    assert hasattr(tqdm, "_lock")
