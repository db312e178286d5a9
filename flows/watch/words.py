"""What is told about a run that is followed: one line about all of it, one per change, one at its end."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from flows.watch.state import RunState, StageState, Status

#: a running stage gets a line of its own whenever this share more of it is done
_STEP = 0.1


def duration(seconds: float) -> str:
    """E.g. "45 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def overview(state: RunState) -> str:
    """How far all of it is, and when it will end."""
    kept = {"done": state.count("done"), "found in the store": state.count("cached")}
    counts = kept | {name: state.count(name) for name in _COUNTED}
    words = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    parts = [f"{len(state.stages)} stages: {words}" if state.stages else "no stage has begun"]
    if state.cells:
        ended = sum(cell is not None and not cell.alive for cell in state.cells.values())
        parts.insert(0, f"{ended} of {len(state.cells)} cells ended")
    return "; ".join([*parts, *([ending(state)] if state.alive else [])])


_COUNTED: tuple[Status, ...] = ("running", "waiting", "failed", "skipped")


def ending(state: RunState) -> str:
    """When it will end, as far as that is known."""
    if state.stages and not state.not_begun and not state.count("running", "waiting"):
        return "every stage has ended, now it is recorded"
    if state.left is None:
        return "no estimate yet: nothing like what is left was timed before"
    at = (state.at + timedelta(seconds=state.left)).astimezone()
    rest = f", {state.uncounted} stages not counted that were never timed" if state.uncounted else ""
    return f"about {duration(state.left)} left, until {at:%H:%M}{rest}"


def stage_words(stage: StageState) -> str:
    """What there is to tell of a stage besides its name."""
    match stage.status:
        case "running":
            left = "" if stage.left is None else f"about {duration(stage.left)} left"
            share = f"{100 * stage.share:.0f} %" if stage.share else ""
            return ", ".join(
                filter(None, [f"running for {duration(stage.seconds or 0.0)}", share, stage.message, left])
            )
        case "done":
            return "done" if stage.seconds is None else f"done in {duration(stage.seconds)}"
        case "cached":
            return "found in the store"
        case "waiting":
            return "waiting" if stage.left is None else f"waiting, takes about {duration(stage.left)}"
        case _:
            return f"{stage.status}: {stage.message}" if stage.message else stage.status


def title(state: RunState) -> str:
    """Which one it is."""
    return f"{state.run.name} ({state.run.key})"


def changes(before: RunState | None, now: RunState) -> Iterator[str]:
    """A line for each change since `before`; without that for what is not only waiting or found in the store."""
    old = {stage.key: stage for stage in before.stages} if before else {}
    for stage in now.stages:
        if _changed(old.get(stage.key), stage):
            yield f"{stage.name}: {stage_words(stage)}"
    for name, cell in now.cells.items():
        known = before.cells.get(name) if before else None
        if cell is not None and not cell.alive and (known is None or known.alive):
            yield f"cell {name}: {end(cell)}"


def end(state: RunState) -> str:
    """How it ended, and after how long."""
    code, message = state.run.exit_code, state.run.message
    if code is None:
        return "ended without a word, it was killed; the same command goes on from there"
    words = "completed" if code == 0 else f"ended with exit code {code}"
    return f"{words} after {duration(state.seconds)}" + (f": {message}" if message else "")


def _changed(before: StageState | None, now: StageState) -> bool:
    if before is None:
        return now.status not in ("waiting", "cached")
    if before.status != now.status:
        return True
    return now.status == "running" and int(before.share / _STEP) != int(now.share / _STEP)
