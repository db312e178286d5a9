"""`slimline serve`: one process that runs specs on a schedule, with a Prefect server of its own unless there is one."""

from __future__ import annotations

import json
import logging
import os
import zoneinfo
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flows.errors import SpecError
from flows.runtime.flow_processes import serve_until_stopped
from flows.runtime.prefect_access import check_prefect
from flows.runtime.servers import prefect_server
from flows.spec.load import is_night, load_night, load_spec

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

log = logging.getLogger("slimline")

#: Prefect refuses them in the name of a deployment
_NOT_IN_NAMES = "/%&<>"
_LONGEST_INTERVAL = 366 * 86_400.0


@dataclass(frozen=True)
class Timetable:
    """When to run: by cron, every `interval` seconds, or (neither) only when asked to. Raises SpecError."""

    cron: str | None = None
    interval: float | None = None
    timezone: str = "UTC"
    """Of the cron expression, e.g. "Europe/Berlin"."""

    def __post_init__(self) -> None:
        if self.cron is not None and self.interval is not None:
            raise SpecError("--cron and --interval: give one of them")
        if self.interval is not None and not 1 <= self.interval <= _LONGEST_INTERVAL:
            raise SpecError(f"--interval {self.interval:g} is not between a second and a year; give seconds")
        if self.timezone not in zoneinfo.available_timezones():
            raise SpecError(f"--timezone {self.timezone!r} is no time zone; give one such as UTC or Europe/Berlin")
        if self.cron is not None:
            from prefect.schedules import Cron

            try:
                Cron(self.cron)
            except ValueError as error:
                raise SpecError(
                    f"--cron {self.cron!r} is no cron expression; give minute, hour, day, month and weekday, e.g. "
                    "'0 2 * * *'"
                ) from error

    @property
    def schedules(self) -> list[Schedule]:
        """Prefect's schedules for a deployment: one, or none."""
        from prefect.schedules import Cron, Interval

        if self.cron is not None:
            return [Cron(self.cron, timezone=self.timezone)]
        if self.interval is not None:
            return [Interval(timedelta(seconds=self.interval), timezone=self.timezone)]
        return []


def serve_specs(
    specs: Sequence[str],
    timetable: Timetable,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    paused: bool = False,
    limit: int = 1,
    prefect_port: int = 4200,
) -> None:
    """Run nights and specs by the timetable until a signal ends it; then every process that was started here ends too.

    name: of the deployment, by default that of the spec. limit: flow runs at once. Raises SpecError before anything is
    started if a spec cannot be used.
    """
    if name is not None and len(specs) > 1:
        raise SpecError(f"--name {name!r} is one name for {len(specs)} specs; leave it out and each has its spec's")
    if name is not None and (not name.strip() or set(name) & set(_NOT_IN_NAMES)):
        raise SpecError(f"--name {name!r} is none for Prefect; give one without {' '.join(_NOT_IN_NAMES)}")
    anchors = [_anchor(spec, overrides) for spec in specs]
    with _server(prefect_port) as url:
        from flows.serve.automations import ensure_zombie_automation

        deployments = [
            _deployment(spec, timetable, [*overrides, *anchor], name=name, paused=paused)
            for spec, anchor in zip(specs, anchors, strict=True)
        ]
        for deployment in deployments:
            _refuse_foreign(deployment)
        ensure_zombie_automation()
        for deployment in deployments:
            log.info("serving %s/%s", deployment.flow_name, deployment.name)
        log.info("Prefect: %s; Ctrl-C ends the serving", url.removesuffix("/api"))
        serve_until_stopped(deployments, limit)


def _anchor(spec: str, overrides: Sequence[str]) -> list[str]:
    """An override that says where relative paths of a spec start, if it has some: a flow run starts in whatever folder
    its process was given. Raises SpecError if the spec cannot be used."""
    folder = (load_night if is_night(spec) else load_spec)(spec, overrides).folder
    return [] if folder is None else [f"folder={json.dumps(folder)}"]


def _deployment(
    spec: str, timetable: Timetable, overrides: Sequence[str], *, name: str | None, paused: bool
) -> RunnerDeployment:
    from flows.serve.deployments import nightly, run

    path = Path(os.path.expanduser(spec))
    flow = nightly if is_night(spec) else run
    deployment = flow.to_deployment(
        name=name or path.stem,
        schedules=timetable.schedules,
        paused=paused,
        # a flow run starts in whatever folder its process was given
        parameters={"spec": str(path.absolute()) if path.is_file() else spec, "overrides": list(overrides)},
        tags=["slimline"],
    )
    deployment = cast("RunnerDeployment", deployment)  # it would be a coroutine in a coroutine
    # not the module that defines the flow: this one prepares the process that runs it
    deployment.entrypoint = f"flows.serve.deployments.{flow.name}"
    return deployment


def _refuse_foreign(deployment: RunnerDeployment) -> None:
    """Raise SpecError for a name under which the server has a deployment of other flows: ours would take its place."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    name = f"{deployment.flow_name}/{deployment.name}"
    with get_client(sync_client=True) as client:
        try:
            there = client.read_deployment_by_name(name)
        except ObjectNotFound:
            return
    if there.entrypoint != deployment.entrypoint:
        raise SpecError(
            f"the Prefect server has a deployment {name} that is not slimline's (entrypoint {there.entrypoint}); "
            "give this one another --name"
        )


@contextmanager
def _server(port: int) -> Iterator[str]:
    """The URL of the API of the server that is configured, or of one that is started for as long as the block lasts."""
    check_prefect()
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    configured = PREFECT_API_URL.value()
    if configured:
        yield str(configured)
        return
    with prefect_server(port) as url:
        os.environ["PREFECT_API_URL"] = url  # children get it too
        refresh_global_settings_context()
        yield url
