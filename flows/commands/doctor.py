"""`slimline doctor`: is this machine ready, and does it tell or allow more than it should? One line per question."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from flows.commands.exposures import exposures
from flows.runtime.prefect_access import check_prefect
from infra.artifacts.store import ArtifactStore
from infra.offline.repository import WHEELS, installed
from infra.provenance import git_revision, versions
from infra.results.store import ResultsStore
from infra.settings import Settings
from infra.sources.find import sources_from
from infra.tracking.tracker import Tracker
from tasks.devices.placement import device_names


@dataclass(frozen=True)
class Finding:
    """One question and its answer; `bad` findings make the command fail, warnings do not."""

    topic: str
    answer: str
    level: Literal["ok", "warn", "bad"] = "ok"


def examine(settings: Settings, specs: Sequence[str] = ()) -> Iterator[Finding]:
    """Versions, devices, sources, disk, stores, security, in this order.

    specs: files or names of specs to be looked at for tokens, besides those that are shipped.
    """
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield Finding("git revision", git_revision() or "not a checkout")
    yield _asked("devices", lambda: _devices(settings))
    yield _asked("sources", lambda: _sources(settings))
    yield _asked("hub", _hub)
    yield _asked("offline default", _offline)
    yield _asked("artifact store", lambda: _store(settings))
    yield _asked("results (DuckDB)", lambda: _results(settings))
    yield _asked("server (Prefect)", lambda: check_prefect(patience=2.0))
    yield _asked("tracking (MLflow)", Tracker(settings.tracking_uri).check)
    warnings = list(exposures(settings, specs))
    yield from (Finding("security", warning, "warn") for warning in warnings)
    if not warnings:
        yield Finding("security", "servers on this machine only, no passwords in URLs or specs, nobody else may write")


def _asked(topic: str, question: Callable[[], str]) -> Finding:
    try:
        return Finding(topic, question())
    except (ValueError, OSError) as error:
        return Finding(topic, str(error), "bad")


def _devices(settings: Settings) -> str:
    import torch

    names = device_names(settings.device)
    described = [
        f"{name} ({torch.cuda.get_device_name(name)}, {torch.cuda.mem_get_info(name)[1] / 2**30:.0f} GiB)"
        if name.startswith("cuda")
        else f"{name} ({os.cpu_count()} cores)"
        for name in names
    ]
    return f"{', '.join(described)} (SLIMLINE_DEVICE={settings.device})"


def _sources(settings: Settings) -> str:
    sources = sources_from(None, settings)
    places = [str(folder) for folder in sources.mirrors]
    places += ["offline default"] if sources.offline else []
    places += ["hub"] if sources.hub else []
    return f"models and data are looked for in: {', '.join(places)} (SLIMLINE_MIRROR={settings.mirror or ''})"


def _hub() -> str:
    from infra.hub import reachable

    return "reachable" if reachable() else "not reachable: use a mirror or the offline default (SLIMLINE_MIRROR)"


def _results(settings: Settings) -> str:
    return ResultsStore.of(settings).check()


def _offline() -> str:
    for package in WHEELS:
        installed(package)
    return f"can be built: {', '.join(WHEELS.values())} are installed"


def _store(settings: Settings) -> str:
    ArtifactStore(settings.store_root).preflight()
    usage = shutil.disk_usage(settings.store_root)
    return f"{settings.store_root}: writable, {usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}"
