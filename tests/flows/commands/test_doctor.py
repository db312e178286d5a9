"""`slimline doctor` warns of what others could read, change or run, and has nothing to say about a careful machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.commands.doctor import Finding, is_loopback, security_warnings
from flows.errors import SpecError
from infra.settings import Settings
from tests.infra.test_secrets import secret_variables

TOKEN = "hf_" + "aB3d" * 8


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A machine on which nothing is open: only this test's home, no servers but local ones, no token."""
    named = ("PREFECT_SERVER", "MLFLOW_", "HF_", "SLIMLINE_", "TORCH_FORCE", "PREFECT_API")
    for name in {*secret_variables(), *(name for name in os.environ if name.startswith(named))}:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder.name.startswith(("pytest-", "popen-", "test_")):
            folder.chmod(0o755)
    (tmp_path / "home").mkdir(mode=0o755)
    return Settings(home=tmp_path / "home")


def test_nothing_is_said_about_a_careful_machine(settings: Settings) -> None:
    assert list(security_warnings(settings)) == []


@pytest.mark.parametrize("variables, words", [
    ({"PREFECT_SERVER_API_HOST": "0.0.0.0"}, "PREFECT_SERVER_API_HOST=0.0.0.0: a server started by hand listens on"),
    ({"MLFLOW_HOST": "10.0.0.7"}, "MLFLOW_HOST=10.0.0.7: a server started by hand listens on a network"),
    ({"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true"}, "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE is set"),
    ({"PREFECT_API_URL": "http://prefect.lan/api", "PREFECT_API_KEY": TOKEN}, "PREFECT_API_KEY is sent there readable"),
    ({"SLIMLINE_MLFLOW_URI": "http://ml.lan", "MLFLOW_TRACKING_PASSWORD": "secret1"}, "use https://"),
    ({"SLIMLINE_MLFLOW_URI": "postgresql://u:secret1@db/x"}, "SLIMLINE_MLFLOW_URI has a password or token in it"),
    ({"SLIMLINE_REMOTE": "https://host/x?sig=0a1b2c"}, "SLIMLINE_REMOTE has a password or token in it"),
    ({"SLIMLINE_RUNNER_ADDRESS": "tcp://u:secret1@h:1"}, "SLIMLINE_RUNNER_ADDRESS has a password or token in it"),
    ({"HF_ALLOW_CODE_EVAL": "1"}, "evaluations then run code that a model wrote"),
    ({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, "torch.load then runs code out of pickles"),
    ({"HF_DATASETS_TRUST_REMOTE_CODE": "true"}, "HF_DATASETS_TRUST_REMOTE_CODE=true"),
    ({"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}, "MLflow then loads pickled models"),
])  # fmt: skip
def test_what_the_environment_opens(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (warning,) = security_warnings(settings)
    assert words in warning
    assert not any(secret in warning for secret in (TOKEN, "secret1", "0a1b2c"))


@pytest.mark.parametrize("variables", [
    {"PREFECT_API_URL": "https://prefect.lan/api", "PREFECT_API_KEY": TOKEN},
    {"PREFECT_API_URL": "http://prefect.lan/api"},
    {"SLIMLINE_MLFLOW_URI": "http://localhost:5000", "MLFLOW_TRACKING_TOKEN": TOKEN},
    {"PREFECT_SERVER_API_HOST": "::1", "MLFLOW_HOST": "localhost"},
    {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "HF_ALLOW_CODE_EVAL": "0"},
])  # fmt: skip
def test_what_it_does_not_open(settings: Settings, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert list(security_warnings(settings)) == []


def test_a_home_that_others_may_write(settings: Settings) -> None:
    settings.home.chmod(0o775)
    (warning,) = security_warnings(settings)
    assert f"chmod go-w {settings.home}" in warning


def test_a_token_file_that_others_may_read(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir(mode=0o755)
    (tmp_path / "hf" / "token").write_text(TOKEN)
    (tmp_path / "hf" / "token").chmod(0o644)
    (warning,) = security_warnings(settings)
    assert f"chmod 600 {tmp_path / 'hf' / 'token'}" in warning
    (tmp_path / "hf").chmod(0o700)
    assert list(security_warnings(settings)) == []


def test_a_token_in_a_spec_that_is_named(settings: Settings, tmp_path: Path) -> None:
    spec = tmp_path / "my.yaml"
    spec.write_text(f"name: my\nmodel: {{id: a/b, revision: {TOKEN}}}\n")
    (warning,) = security_warnings(settings, [str(spec), "smoke"])
    assert f"{spec}: model.revision holds a token or password" in warning
    assert TOKEN not in warning
    with pytest.raises(SpecError, match="there is no spec file 'nosuch'"):
        list(security_warnings(settings, ["nosuch"]))


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "host", "")))


def test_a_warning_is_no_failure() -> None:
    assert Finding("security", "x", "warn").level != "bad"
