from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.errors import SettingsInvalid
from infra.settings import Settings, load_settings
from tests.infra.processes import finish, start


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("SLIMLINE_")]:
        monkeypatch.delenv(variable)


def test_defaults_lie_under_the_users_home() -> None:
    settings = load_settings()
    home = Path.home() / ".slimline"
    assert settings.home == home
    assert settings.store_root == home / "store"
    assert settings.results_path == home / "results.duckdb"
    assert settings.results_folder is None
    assert settings.tracking_uri == f"sqlite:///{home}/mlflow.db"
    assert settings.offline_root == home / "offline"
    assert (settings.mirror, settings.device) == (None, "auto")


def test_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path))
    monkeypatch.setenv("SLIMLINE_MIRROR", "offline")
    monkeypatch.setenv("SLIMLINE_DEVICE", "cuda:1")
    monkeypatch.setenv("SLIMLINE_MLFLOW_URI", "http://tracking:5000")
    monkeypatch.setenv("SLIMLINE_RESULTS_DB", str(tmp_path / "other.duckdb"))
    monkeypatch.setenv("SLIMLINE_RESULTS_FOLDER", "~/shared")
    monkeypatch.setenv("SLIMLINE_EVAL_BATCH_SIZE", "16")
    monkeypatch.setenv("SLIMLINE_ACTIVATION_BUDGET_GIB", "1.5")
    settings = load_settings()
    assert settings.store_root == tmp_path / "store"
    assert settings.tracking_uri == "http://tracking:5000"
    assert settings.results_path == tmp_path / "other.duckdb"
    assert settings.results_folder == Path.home() / "shared"
    assert (settings.mirror, settings.device) == ("offline", "cuda:1")
    assert (settings.eval_batch_size, settings.activation_budget_gib) == (16, 1.5)


def test_a_relative_home_is_fixed_when_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIMLINE_HOME", "here")
    settings = load_settings()
    monkeypatch.chdir("/")
    assert settings.store_root == tmp_path / "here" / "store"


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLINE_MIRROR", "")
    monkeypatch.setenv("SLIMLINE_ACTIVATION_BUDGET_GIB", "")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLIMLINE_EVAL_BATCH_SIZE", "many"),
        ("SLIMLINE_EVAL_BATCH_SIZE", "0"),
        ("SLIMLINE_ACTIVATION_BUDGET_GIB", "-1"),
        ("SLIMLINE_ACTIVATION_BUDGET_GIB", "nan"),
        ("SLIMLINE_DEVICE", "the big one"),
    ],
)
def test_a_wrong_value_is_one_sentence(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsInvalid, match=f"{variable}='{value}' cannot be used") as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_a_misspelt_variable_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SLIMLINE_MIROR", "offline")
    with caplog.at_level(logging.WARNING):
        assert load_settings().mirror is None
    assert "SLIMLINE_MIROR is not a setting and is ignored; did you mean 'SLIMLINE_MIRROR'?" in caplog.text


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().device = "cpu"  # type: ignore[misc, unused-ignore]


def test_planning_modules_import_nothing_heavy() -> None:
    code = """
import sys, infra.settings, infra.keys, infra.registry, infra.artifacts.store, infra.provenance, infra.tracking.tracker
print({"torch", "transformers", "mlflow", "datasets", "lm_eval", "peft", "duckdb", "prefect"} & set(sys.modules))
"""
    assert finish(start(code)) == "set()"


@pytest.mark.parametrize(
    "variable, value",
    [
        ("EVAL_BATCH_SIZE", str(10**30)),
        ("WALK_BATCH_SIZE", "0"),
        ("EVAL_PROCESSES", "1000000"),
        ("WALK_PROCESSES", "1000000"),
        ("RUNNER_WORKERS", "1000000"),
        ("ACTIVATION_BUDGET_GIB", "1e308"),
        ("DISK_BUDGET_GIB", "nan"),
        ("RETRY_DELAY", "1e30"),
        ("RETRIES", "-1"),
        ("RESULTS_DB", "/"),
        ("HOME", "~no-such-user-here/x"),
    ],
)
def test_what_no_machine_can_do_is_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SLIMLINE_{variable}", value)
    with pytest.raises(SettingsInvalid, match=rf"SLIMLINE_{variable}=.* cannot be used: .*; change or unset it"):
        load_settings()
