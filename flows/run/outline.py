"""The stages of a run as a tree: under each checkpoint what is taken from it, what measures it, and what it becomes."""

from __future__ import annotations

from collections.abc import Iterator

from flows.run.stages import Stage, StageGraph


def outline(graph: StageGraph) -> tuple[tuple[int, Stage], ...]:
    """Every stage once with its depth, in the order in which a tree is read."""
    below: dict[str | None, list[Stage]] = {}
    for stage in graph.stages:
        reads = getattr(stage.request, "checkpoint", None)
        below.setdefault(reads.key if reads else None, []).append(stage)
    return tuple(_walk(None, 0, below))


def _walk(parent: str | None, depth: int, below: dict[str | None, list[Stage]]) -> Iterator[tuple[int, Stage]]:
    # what makes the next checkpoint comes last, since its own branch follows it
    for stage in sorted(below.get(parent, ()), key=lambda stage: stage.ref.kind == "checkpoint"):
        yield depth, stage
        yield from _walk(stage.ref.key, depth + 1, below)
