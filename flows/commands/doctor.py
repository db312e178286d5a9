"""`slimline doctor`: is this machine ready, and does it tell or allow more than it should? One line per question.

A security warning says what others could read, change or make this machine run, and the way out. None of them hinders a
run: a cluster behind a firewall may want a server on all addresses, and says so in its own settings.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from flows.runtime.prefect_access import check_prefect
from flows.spec.load import find_spec, read_raw, shipped_nights, shipped_specs
from infra.artifacts.store import ArtifactStore
from infra.offline.repository import WHEELS, installed
from infra.provenance import git_revision, versions
from infra.results.store import ResultsStore
from infra.secrets import has_password, place_of_secret, redacted
from infra.settings import Settings
from infra.sources.find import sources_from
from infra.tracking.tracker import Tracker
from tasks.devices.placement import device_names

#: addresses that servers bind to
_HOSTS = ("PREFECT_SERVER_API_HOST", "MLFLOW_HOST")
#: other settings that take a server's guard away
_UNGUARDED = {"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "MLflow's server then answers requests of any web page"}
#: variables that make a library run what it would otherwise refuse
_CODE = {
    "HF_DATASETS_TRUST_REMOTE_CODE": "older versions of datasets then run the scripts of data sets",
    "HF_ALLOW_CODE_EVAL": "evaluations then run code that a model wrote",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "torch.load then runs code out of pickles, where a library does not forbid it",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "MLflow then loads pickled models",
}
_YES = {"1", "true", "yes", "on"}
#: servers that are sent a password or token
_SERVERS = {
    "PREFECT_API_URL": ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"),
    "SLIMLINE_MLFLOW_URI": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
    "HF_ENDPOINT": ("HF_TOKEN",),
    "SLIMLINE_REMOTE": ("AWS_SECRET_ACCESS_KEY",),
}


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
    yield _asked("results (DuckDB)", lambda: ResultsStore.of(settings).check())
    yield _asked("server (Prefect)", lambda: check_prefect(patience=2.0))
    yield _asked("tracking (MLflow)", Tracker(settings.tracking_uri).check)
    warnings = list(security_warnings(settings, specs))
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


def _offline() -> str:
    for package in WHEELS:
        installed(package)
    return f"can be built: {', '.join(WHEELS.values())} are installed"


def _store(settings: Settings) -> str:
    ArtifactStore(settings.store_root).preflight()
    usage = shutil.disk_usage(settings.store_root)
    return f"{settings.store_root}: writable, {usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}"


def security_warnings(settings: Settings, specs: Sequence[str] = ()) -> Iterator[str]:
    """One sentence per thing that should be looked after; `specs` are looked through besides the shipped ones."""
    yield from _open_servers(os.environ)
    yield from _plain_connections(os.environ)
    yield from _passwords_in_urls(os.environ)
    yield from _code_allowed(os.environ)
    yield from _secrets_in_specs(specs)
    yield from _open_files(settings, os.environ)


def _open_servers(environment: Mapping[str, str]) -> Iterator[str]:
    for variable in _HOSTS:
        host = environment.get(variable, "")
        if host and not is_loopback(host):
            yield (
                f"{variable}={host}: a server started by hand listens on a network, and whoever reaches it can run "
                "code here; unset it, or set it to 127.0.0.1"
            )
    for variable, consequence in _UNGUARDED.items():
        if environment.get(variable, "").lower() in _YES:
            yield f"{variable} is set: {consequence}; unset it"


def _plain_connections(environment: Mapping[str, str]) -> Iterator[str]:
    for variable, credentials in _SERVERS.items():
        url = urlsplit(environment.get(variable, ""))
        sent = [name for name in credentials if environment.get(name)]
        if url.scheme == "http" and not is_loopback(url.hostname or "") and (sent or url.password):
            what = sent[0] if sent else "the password in it"
            yield f"{variable} is a http:// address of another machine: {what} is sent there readable; use https://"


def _passwords_in_urls(environment: Mapping[str, str]) -> Iterator[str]:
    others = [name for name in environment if name.startswith("SLIMLINE_") and name not in _SERVERS]
    for variable in (*_SERVERS, *sorted(others)):
        if has_password(environment.get(variable, "")):
            yield (
                f"{variable} has a password or token in it ({redacted(environment[variable])}); give it where the "
                "server's client looks for it (MLFLOW_TRACKING_USERNAME and _PASSWORD, PREFECT_API_AUTH_STRING, "
                "~/.pgpass, the object store's own variables)"
            )


def _code_allowed(environment: Mapping[str, str]) -> Iterator[str]:
    for variable, consequence in _CODE.items():
        if environment.get(variable, "").lower() in _YES:
            yield f"{variable}={environment[variable]}: {consequence}; slimline does not need it: unset it"


def _secrets_in_specs(specs: Sequence[str]) -> Iterator[str]:
    paths = {*shipped_specs().values(), *shipped_nights().values(), *(find_spec(name) for name in specs)}
    for path in sorted(paths):
        place = place_of_secret(read_raw(path))
        if place is not None:
            yield f"{path}: {place} holds a token or password; take it out and have a new one made"


def _open_files(settings: Settings, environment: Mapping[str, str]) -> Iterator[str]:
    if _mode(settings.home) & 0o022:
        yield (
            f"{settings.home} may be written by others, who could put their own checkpoints into the store; "
            f"chmod go-w {settings.home}"
        )
    cache = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    token = Path(environment.get("HF_TOKEN_PATH") or cache / "token").expanduser()
    if _mode(token) & 0o077:
        yield f"{token} may be read by others, and is your key to the hub; chmod 600 {token}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _mode(path: Path) -> int:
    """Permission bits; 0 if there is no such file, and where nobody else may enter a folder that it lies in."""
    try:
        reached = all(parent.stat().st_mode & 0o011 for parent in path.absolute().parents)
        return stat.S_IMODE(path.stat().st_mode) if reached else 0
    except OSError:
        return 0
