"""Whether Prefect can be used, asked in seconds before any flow starts: its settings, the server that they name, or
the temporary server that it starts where they name none. What fails in mid-run: tasks/execution/retries.py."""

from __future__ import annotations

import os
import ssl
import sys
import time
import tomllib
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from pydantic import ValidationError

from flows.errors import PrefectUnusable
from flows.runtime.environment import set_prefect_defaults
from flows.runtime.prefect_database import check_database
from flows.runtime.user_errors import causes, first_line
from infra.filesystem.disk import why_unwritable
from infra.secrets import redacted
from infra.settings import load_settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_URL = "PREFECT_API_URL"
_STORAGE = "PREFECT_LOCAL_STORAGE_PATH"
#: seconds for one question to the server, and between the two times that it is asked
_PATIENCE, _PAUSE = 10.0, 1.0


def import_prefect() -> None:
    """Import Prefect, which reads its settings then. Raises PrefectUnusable for settings that it cannot read."""
    profiles, settings = _profiles_file(), load_settings()
    try:
        tomllib.loads(profiles.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        pass  # Prefect has defaults
    except (OSError, ValueError) as error:
        raise PrefectUnusable(
            f"Prefect's profiles {profiles} cannot be read ({error}); mend that file, or remove it for the defaults"
        ) from error
    held = _HeldStream(sys.stderr)
    try:
        with redirect_stderr(cast("TextIO", held)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Failed to create the Prefect home")  # check_database says it
            if "prefect.context" not in sys.modules:  # else somebody before us did this
                set_prefect_defaults(settings)
            import prefect.main  # noqa: F401 (the logging, by these settings)
        held.release()
    except Exception as error:
        raise PrefectUnusable(f"Prefect cannot be used: {_reason(error, profiles)}") from error


def check_prefect(patience: float = 60.0) -> str:
    """What flows would report to, in words. Raises PrefectUnusable if that cannot work.

    patience: seconds to wait for a database that somebody has locked.
    """
    import_prefect()
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED

    _check_storage()
    if PREFECT_API_URL.value():
        return _check_server(str(PREFECT_API_URL.value()))
    if not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        raise PrefectUnusable(
            f"Prefect has no server: {_URL} is not set and PREFECT_SERVER_EPHEMERAL_ENABLED is false; set one of them"
        )
    return f"a temporary server is started with each run; database: {check_database(patience)}"


def server_is_named() -> bool:
    """Whether Prefect's settings name a server. Raises PrefectUnusable for settings that it cannot read."""
    import_prefect()
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def reach_prefect() -> None:
    """Make sure that there is a server that answers; a temporary one is started. Raises PrefectUnusable."""
    check_prefect()
    if not server_is_named():
        from flows.runtime.servers import start_temporary_server

        start_temporary_server()


def cache_records() -> Path:
    """The folder in which Prefect keeps the records of its cache. Raises PrefectUnusable."""
    import_prefect()
    from prefect.settings import Settings as PrefectSettings

    return PrefectSettings().results.local_storage_path


class _HeldStream:
    """Standard error of which nothing is seen until it is released: Prefect's log handlers keep it as their own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._held: list[str] | None = []

    def write(self, text: str) -> int:
        if self._held is None:
            return self._stream.write(text)
        self._held.append(text)
        return len(text)

    def release(self) -> None:
        held, self._held = self._held or [], None
        self._stream.write("".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _check_storage() -> None:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH

    folder = Path(str(PREFECT_LOCAL_STORAGE_PATH.value())).absolute()
    if reason := why_unwritable(folder):
        raise PrefectUnusable(
            f"Prefect cannot keep its results in {folder} ({reason}); make it writable, or set SLIMLINE_HOME, below "
            f"which that is by default, or {_STORAGE} to another folder"
        )


def _check_server(url: str) -> str:
    from prefect import __version__
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    where = f"the Prefect server at {redacted(url)} ({_origin()})"
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": _PATIENCE}, sync_client=True) as client,
        ):
            version = _version(client)
    except Exception as error:
        raise PrefectUnusable(f"{where} {_why(error)}") from error
    if version and version.partition(".")[0] != __version__.partition(".")[0]:
        raise PrefectUnusable(
            f"{where} is of version {version}, and Prefect {__version__} is installed here; both need the same number "
            f"before the first dot: install another one here or there, or {_unset()}"
        )
    return f"{redacted(url)} answers ({_origin()}), version {version or 'of Prefect Cloud'}"


def _version(client: SyncPrefectClient) -> str:
    """Of the server, "" of the cloud. Asked twice: a server may be starting. Raises what the client raises."""
    if client.api_healthcheck() is not None:
        time.sleep(_PAUSE)
        error = client.api_healthcheck()
        if error is not None:
            raise error
    if client.server_type == "cloud":
        return ""
    version = client.api_version()
    if not isinstance(version, str):
        raise ValueError(f"it says that its version is {version!r}")
    return version


def _why(error: Exception) -> str:
    """What is wrong with the server, and the way out."""
    chain = list(causes(error))
    if any(type(one).__name__ in ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError") for one in chain):
        return f"has a URL that is none ({first_line(error)}); write http://HOST:PORT/api, or {_unset()}"
    status = next((code for one in chain if (code := _status(one)) is not None), None)
    if status in (401, 403):
        wanted = "PREFECT_API_AUTH_STRING or PREFECT_API_KEY as it demands"
        return f"refuses us (HTTP {status}); give it {wanted}, or {_unset()}"
    if status is not None and status >= 500:
        return f"answers with an error of its own (HTTP {status}); see its log, or {_unset()}"
    if status is not None or any(isinstance(one, ValueError | TypeError) and not _of_client(one) for one in chain):
        said = f"HTTP {status}" if status is not None else first_line(error)
        return f"is no Prefect server ({said}); the URL of one ends in /api: correct it, or {_unset()}"
    text = " ".join(str(one) for one in chain)
    if any(isinstance(one, ssl.SSLError) for one in chain) or "SSL" in text:
        return (
            f"cannot be trusted or speaks no TLS ({first_line(error)}); correct http or https in the URL, set "
            f"PREFECT_API_SSL_CERT_FILE to the certificate of its authority, or {_unset()}"
        )
    if isinstance(error, OSError):
        return f"cannot be asked ({error}); correct PREFECT_API_SSL_CERT_FILE, or {_unset()}"
    return f"does not answer ({first_line(error)}); start it, correct the URL, or {_unset()}"


def _origin() -> str:
    """Who says that there is a server."""
    if os.environ.get(_URL):
        return f"environment variable {_URL}"
    from prefect.context import get_settings_context

    profile = get_settings_context().profile
    if any(setting.name == _URL for setting in profile.settings):
        return f"profile {profile.name!r} in {profile.source}"
    return f"{_URL} in a prefect.toml, pyproject.toml or .env file here"


def _unset() -> str:
    way = f"unset {_URL}" if os.environ.get(_URL) else f"`prefect config unset {_URL}`"
    return f"{way} for a temporary server"


def _profiles_file() -> Path:
    """Where Prefect looks for profiles."""
    named = os.environ.get("PREFECT_PROFILES_PATH")
    home = os.environ.get("PREFECT_HOME") or "~/.prefect"
    return Path(os.path.expanduser(named or os.path.join(home, "profiles.toml")))


def _reason(error: Exception, profiles: Path) -> str:
    """Why Prefect could not be imported, and who says so: a setting, most often."""
    invalid = next((cause for cause in causes(error) if isinstance(cause, ValidationError)), None)
    if invalid is None:
        return f"{first_line(error)}; look at the environment variables PREFECT_... and at {profiles}"
    problem = invalid.errors(include_url=False)[0]
    places = ", ".join(str(part) for part in problem["loc"])
    variables = [
        name for name, value in os.environ.items() if name.startswith("PREFECT_") and value == problem["input"]
    ]
    who = f"environment variable {variables[0]}" if variables else f"its setting {places} in {profiles}"
    return f"{who} is {redacted(repr(problem['input']))}: {problem['msg'].lower()}; change or unset it"


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _of_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "ssl")
