"""Showing a followed run until it ends: in a terminal a table that is redrawn, everywhere else a line per change."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from flows.records.render import printable
from flows.watch.state import RunState, StageState, Watcher
from flows.watch.words import changes, end, overview, stage_words, title
from infra.running.files import FollowedRun

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: seconds between two looks
_PAUSE = 1.0
_STYLES = {"done": "green", "running": "bold cyan", "failed": "bold red", "skipped": "yellow"}
#: lines around the table
_FRAME = 3
_MOST_WIDE = 60


class _Shown(Protocol):
    def __call__(self, state: RunState) -> None: ...


def follow(watcher: Watcher, run: FollowedRun, say: Callable[[str], None]) -> int:
    """Show the run until it has ended; returns the exit code of its command, 1 if it was killed.

    say: prints a line at once.
    """
    with _screen(say) as show:
        state = watcher.look(run)
        show(state)
        while state.alive:
            time.sleep(_PAUSE)
            state = watcher.look(state.run)
            show(state)
    say(printable(f"{title(state)}: {end(state)}"))
    return 1 if state.run.exit_code is None else state.run.exit_code


@contextmanager
def _screen(say: Callable[[str], None]) -> Iterator[_Shown]:
    """A terminal that can go back in its lines gets the table."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("", "dumb", "unknown"):
        yield _plain(say)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False)
    with Live(console=console, auto_refresh=False) as live:
        yield lambda state: live.update(_table(state, console), refresh=True)


def _plain(say: Callable[[str], None]) -> _Shown:
    before: RunState | None = None

    def show(state: RunState) -> None:
        nonlocal before
        lines = [f"{title(state)}: {overview(state)}"] if before is None else []
        lines += changes(before, state)
        if before is not None and state.alive and _statuses(before) != _statuses(state):
            lines.append(overview(state))
        for line in lines:
            say(f"{datetime.now():%H:%M:%S} {printable(line)}")
        before = state

    return show


def _statuses(state: RunState) -> list[tuple[str, str]]:
    return [(stage.key, stage.status) for stage in state.stages]


def _table(state: RunState, console: Console) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows: Iterable[_Row] = _cell_rows(state) if state.cells else map(_row, state.stages)
    room = max(1, console.height - _FRAME)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, max_width=_MOST_WIDE)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, words, status in _fitting(rows, room):
        style = _STYLES.get(status, "")
        table.add_row(Text(printable(name)), Text(printable(words), style=style))
    return Group(Text(printable(title(state)), style="bold"), Text(overview(state)), table)


_Row = tuple[str, str, str]


def _row(stage: StageState) -> _Row:
    return stage.name, stage_words(stage), stage.status


def _cell_rows(state: RunState) -> Iterator[_Row]:
    """A line per cell: how it ended, or its stages and the first that runs."""
    for name, cell in state.cells.items():
        if cell is None:
            yield name, "waiting", "waiting"
        elif not cell.alive:
            yield name, end(cell), "done" if cell.run.exit_code == 0 else "failed"
        else:
            kept = f"{cell.count('done', 'cached')} of {len(cell.stages)} stages"
            running = [f"{stage.name} {stage_words(stage)}" for stage in cell.running]
            yield name, "; ".join([kept, *running]), "running" if running else "waiting"


def _fitting(rows: Iterable[_Row], room: int) -> list[_Row]:
    """As many as there is room for: what only waits goes first, then what ended, and the last line counts them."""
    shown, hidden = list(rows), 0
    for statuses in (("waiting", "skipped"), ("cached",), ("done",)):
        for row in [row for row in reversed(shown) if row[2] in statuses]:
            if len(shown) + bool(hidden) > room:
                shown.remove(row)
                hidden += 1
    return [*shown, ("", f"and {hidden} more", "")] if hidden else shown
