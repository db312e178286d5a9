"""What we set by default for Prefect never stands above what the user has set, whatever name and place that has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.flows.home import PROJECT

pytestmark = pytest.mark.slow  # not in `make test-fast`

_COMMAND = "prepared(); from flows.runtime.prefect_access import cache_records, import_prefect; import_prefect()"
_WORKER = "from flows.runtime.worker_process import prepare; import prefect; prepare()"
_SHOWN = """
import json
from flows.commands.app import prepared
{begin}
from prefect.settings import get_current_settings as settings
from flows.runtime.prefect_access import cache_records
here = settings()
print(json.dumps([
    str(here.results.local_storage_path), str(cache_records()), here.flows.heartbeat_frequency,
    here.server.logging_level, here.logging.extra_loggers, here.server.ephemeral.startup_timeout_seconds]))
"""


def shown(folder: Path, begin: str = _COMMAND, **variables: str) -> Any:
    """Storage path and the one of which records are deleted, heartbeat, the server's log level, loggers, time-out."""
    others = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PREFECT_", "SLIM"))}
    own = {"PREFECT_HOME": str(folder / "prefect"), "SLIMLINE_HOME": str(folder / "home"), "PYTHONPATH": str(PROJECT)}
    child = subprocess.run(
        [sys.executable, "-c", _SHOWN.format(begin=begin)],
        env=others | own | variables, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(child.stdout)


def test_our_defaults_where_nothing_is_set(tmp_path: Path) -> None:
    records = str(tmp_path / "home/prefect-results")
    assert shown(tmp_path) == [records, records, 30, "CRITICAL", ["slimline"], 120]


@pytest.mark.parametrize("begin", [_COMMAND, _WORKER])
def test_every_place_where_prefect_looks_counts(begin: str, tmp_path: Path) -> None:
    """A variable by another of its names, a .env file, prefect.toml, pyproject.toml, and the active profile."""
    (tmp_path / ".env").write_text("PREFECT_RUNNER_HEARTBEAT_FREQUENCY=60\n")
    (tmp_path / "prefect.toml").write_text("[server]\nlogging_level = 'INFO'\n")
    (tmp_path / "pyproject.toml").write_text("[tool.prefect.logging]\nextra_loggers = 'mine'\n")
    (tmp_path / "prefect").mkdir()
    profile = "[profiles.own]\nPREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS = 70\n"
    (tmp_path / "prefect/profiles.toml").write_text(f"active = 'own'\n{profile}")
    found = shown(tmp_path, begin, PREFECT_RESULTS_LOCAL_STORAGE_PATH="/own")
    assert found == ["/own", "/own", 60, "INFO", ["mine"], 70]
