"""Environment variables and logging of a process of ours; whatever the user has set wins."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

from flows.spec.validation import one_line
from infra.secrets import keep_secrets_out_of_logs
from infra.settings import PREFIX, Settings, absolute_mirror, load_settings
from pruning.host_memory import one_arena

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_PREFECT_DEFAULTS = {
    # a first start creates Prefect's database; twenty seconds, the default, is not always enough
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # our lines go to the terminal and, as extra logger, to the UI; Prefect's tracebacks of stages go to the UI alone
    "PREFECT_LOGGING_EXTRA_LOGGERS": "slimline",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # a heartbeat every so many seconds (Prefect allows no fewer), for the automation that finds dead flow runs
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


def prepare_environment(settings: Settings) -> None:
    """Put defaults into the environment, before any library is imported. Prefect's: `set_prefect_defaults`."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    make_paths_absolute(settings)
    if not sys.stderr.isatty():  # libraries draw their bars even into log files; ours look first
        os.environ.setdefault("TQDM_DISABLE", "1")
    one_arena()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    atexit.register(_silence_interpreter_exit)


def set_prefect_defaults(settings: Settings) -> None:
    """Put those defaults of Prefect's into the environment, for children too, that the user has set nowhere.

    Prefect itself says what is set: its variables have several names each, and a profile, a .env file, prefect.toml or
    pyproject.toml counts as well, but less than a variable does. Cache records lie beside the artifacts they point to.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    chosen = get_current_settings().to_environment_variables(exclude_unset=True, include_aliases=True)
    defaults = _PREFECT_DEFAULTS | {"PREFECT_LOCAL_STORAGE_PATH": str(settings.home / "prefect-results")}
    os.environ.update({name: value for name, value in defaults.items() if name not in chosen})
    refresh_global_settings_context()


def make_paths_absolute(settings: Settings) -> None:
    """Make relative paths in our own variables absolute, for children that start in other folders."""
    for name in ("home", "results_db", "results_folder", "mirror"):
        variable, value = f"{PREFIX}{name.upper()}", getattr(settings, name)
        if os.environ.get(variable) and value is not None:
            os.environ[variable] = absolute_mirror(value) if name == "mirror" else str(value)


def started_by_prefect() -> bool:
    """Whether this process runs our flows for Prefect, so that our own command line has prepared nothing: an engine
    that a worker started, a child of `slimline serve`, or Prefect's own command line (`prefect flow-run retry`)."""
    by_engine = "PREFECT__FLOW_RUN_ID" in os.environ
    by_command_line = "prefect" in Path(sys.argv[0]).parts[-2:]
    return by_engine or by_command_line or multiprocessing.parent_process() is not None


def prepare_process() -> None:
    """What the command line does, for a process of Prefect's, Dask's or Ray's: our environment, our log.

    Prefect may have been imported before, so its settings and its logging are read again. Raises SettingsInvalid.
    """
    settings = load_settings()
    prepare_environment(settings)
    log_to_terminal(verbose=False)
    set_prefect_defaults(settings)
    from prefect.logging.configuration import setup_logging

    setup_logging(incremental=False)


def _silence_interpreter_exit() -> None:
    """duckdb 2.0 prints a page of "leaked" types when the interpreter is torn down in a process that imported Prefect.

    Registered early, so it runs after everybody else's exit handlers, which may still have something to say.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class _OneLine(logging.Formatter):
    """Line breaks in a message are shown as spaces; a traceback keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def log_to_terminal(*, verbose: bool) -> None:
    """One line per stage on standard error; libraries only when they warn."""
    keep_secrets_out_of_logs()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("slimline")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
