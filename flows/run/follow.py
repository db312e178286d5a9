"""A flow run tells who follows it what it is and how it ended: `slimline watch` reads what is written here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from prefect.runtime import flow_run

from flows.run.graph import StageGraph
from flows.run.outcome import StageOutcome
from flows.runtime.user_errors import exit_code
from infra.running.files import FollowedRun, RunningFiles, StageOfRun, ended
from infra.secrets import redacted
from tasks.execution.context import RunContext

#: what is told of a stage's outcome
_TOLD = {"name", "key", "kind", "status", "seconds", "message"}


@contextmanager
def followed_run(
    graph: StageGraph, run_context: RunContext, refreshed: Collection[str]
) -> Iterator[Callable[[Sequence[StageOutcome]], None]]:
    """The body of a run, which calls what this yields with what its stages came to. refreshed: keys to make anew."""
    run = FollowedRun(
        id=str(flow_run.id or graph.run_key),
        kind="run",
        key=graph.run_key,
        name=graph.spec.name,
        part_of=str(run_context.part_of) if run_context.part_of else None,
        model=graph.spec.model.id,
        stages=tuple(
            StageOfRun(name=stage.name, key=key, kind=stage.ref.kind, refreshed=key in refreshed)
            for stage in graph.stages
            for key in [stage.ref.key]
        ),
    )
    came_to: list[StageOfRun] = []

    def tell(outcomes: Sequence[StageOutcome]) -> None:
        came_to[:] = stages_of(outcomes)

    with followed(RunningFiles(run_context.settings.home), run, came_to):
        yield tell


@contextmanager
def followed(files: RunningFiles, run: FollowedRun, stages: Sequence[StageOfRun] = ()) -> Iterator[None]:
    """The body of a flow run, whose end is told however it comes. stages: what they came to, read at the end."""
    with files.following(run) as write:
        try:
            yield
        except BaseException as error:
            message = redacted(str(error) or type(error).__name__)
            write(ended(run, exit_code(error), message, stages))
            raise
        write(ended(run, 0, None, stages))


def stages_of(outcomes: Sequence[StageOutcome]) -> list[StageOfRun]:
    """What is told of them."""
    return [StageOfRun.model_validate(outcome.model_dump(include=_TOLD)) for outcome in outcomes]
