"""What a run is made of: its stages, each with its key, and the graph of them. flows/run/stages.py makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from flows.run.locate import Identities
from flows.spec.run import RunSpec
from infra.artifacts.store import ArtifactRef
from infra.keys import slug, stage_key
from tasks.requests import Request

if TYPE_CHECKING:
    from prefect import Task

    from tasks.execution.context import StageResult


@dataclass(frozen=True)
class Stage:
    """One stage of one run, with all that its name says; what a stage does not have is "".

    action: the name of its task. label: of an evaluation, as in the spec. checkpoint: the name in the run of what it
    makes, measures or takes statistics of. variant: whose calibration or options it takes, if not those of the run.
    """

    task: Task[..., StageResult]
    request: Request
    label: str = ""
    checkpoint: str = ""
    variant: str = ""

    @property
    def action(self) -> str:
        """E.g. "prune": the first part of its name."""
        return str(self.task.name)

    @property
    def names(self) -> tuple[str, ...]:
        """What a user may call it, from all that do the same to itself: "evaluate", "evaluate:mmlu", ..."""
        parts = filter(None, (self.action, self.label, self.checkpoint, self.variant))
        return tuple(accumulate(parts, "{}:{}".format))

    @property
    def name(self) -> str:
        """E.g. "evaluate:perplexity:slimgpt-20", "capture:dense"; the key says the rest."""
        return self.names[-1]

    @property
    def ref(self) -> ArtifactRef:
        """The artifact it makes."""
        return self.request.ref


@dataclass(frozen=True)
class StageGraph:
    """All cached stages of a run in an order in which each comes after its inputs.

    checkpoints: by name; two names that ask for the same stand for one artifact. reports: what is measured, under every
    name, also where that is one stage.
    """

    spec: RunSpec
    identities: Identities
    stages: tuple[Stage, ...]
    checkpoints: dict[str, ArtifactRef]
    reports: tuple[Stage, ...]

    @property
    def aliases(self) -> dict[str, str]:
        """Names of checkpoints that are the same as an earlier one, with that one's name."""
        first: dict[str, str] = {}
        for name, ref in self.checkpoints.items():
            first.setdefault(ref.key, name)
        return {name: first[ref.key] for name, ref in self.checkpoints.items() if first[ref.key] != name}

    @property
    def run_key(self) -> str:
        """Identity of the run: its name and the keys of its stages. The same spec on the same data is the same run."""
        name = self.spec.name
        return stage_key(f"run-{slug(name)}", 1, {"name": name, "stages": [stage.ref.key for stage in self.stages]})

    @property
    def outline(self) -> tuple[tuple[int, Stage], ...]:
        """Every stage once with its depth, as a tree is read: under each checkpoint what is taken from it, what
        measures it, and last what it becomes."""
        below: dict[str | None, list[Stage]] = {}
        for stage in self.stages:
            # what is measured of a file is told below the file
            reads = getattr(stage.request, "export", None) or getattr(stage.request, "checkpoint", None)
            below.setdefault(reads.key if reads else None, []).append(stage)

        def walk(parent: str | None, depth: int) -> Iterator[tuple[int, Stage]]:
            for stage in sorted(below.get(parent, ()), key=lambda stage: stage.ref.kind == "checkpoint"):
                yield depth, stage
                yield from walk(stage.ref.key, depth + 1)

        return tuple(walk(None, 0))
