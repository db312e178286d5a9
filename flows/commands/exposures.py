"""What `slimline doctor` warns about: what others could read, change or make this machine run.

Each warning is one sentence with the way out. None of them hinders a run: a cluster behind a firewall may want a server
on all addresses, and says so in its own settings.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from flows.spec.load import find_spec, read_raw, shipped_nights, shipped_specs
from infra.secrets import has_password, place_of_secret, redacted
from infra.settings import Settings

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


def exposures(settings: Settings, specs: Sequence[str] = ()) -> Iterator[str]:
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
