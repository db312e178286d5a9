"""Tokens and passwords are struck out wherever they could be written down, and nothing else is."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from infra.errors import SourceMissing
from infra.secrets import (
    has_password,
    keep_secrets_out_of_logs,
    place_of_secret,
    redacted,
    secret_values,
    secrets_kept,
)

HF = "hf_" + "aB3d" * 8
PASSWORD = "correct horse/battery!"


def secret_variables() -> tuple[str, ...]:
    """Names of the environment variables that hold a secret."""
    return tuple(sorted(name for name, value in os.environ.items() if secret_values(name, value)))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in secret_variables():
        monkeypatch.delenv(name)


@pytest.mark.parametrize("variable", [
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY",
    "PGPASSWORD", "POSTGRES_PASSWORD", "AZURE_CLIENT_SECRET", "MY_PRIVATE_KEY", "github_token",
])  # fmt: skip
def test_values_of_variables_that_say_so(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, PASSWORD)
    encoded = base64.b64encode(PASSWORD.encode()).decode()
    for form in (PASSWORD, quote(PASSWORD, safe=""), encoded):
        assert redacted(f"it is {form}, they say") == "it is ***, they say"
    assert secret_variables() == (variable,)


@pytest.mark.parametrize("variable, value", [
    ("TOKENIZERS_PARALLELISM", "true"), ("HF_TOKEN_PATH", "/var/me/token"), ("SSH_AUTH_SOCK", "/tmp/ssh-x/agent"),
    ("PWD", "/some/where"), ("OLDPWD", "/some/where"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "enabled"),
    ("XAUTHORITY", "/var/me/.Xauthority"), ("HF_TOKEN", ""), ("KEYBOARD", "english"), ("MY_TOKEN", "none"),
    ("SLIMLINE_MLFLOW_URI", "sqlite:////var/me/mlflow.db"), ("PREFECT_API_URL", "http://127.0.0.1:4200/api"),
])  # fmt: skip
def test_variables_that_hold_none(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    text = f"{value} true /some/where english sqlite:////x http://127.0.0.1:4200/api"
    assert redacted(text) == text
    assert secret_variables() == ()


def test_user_and_password_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:wonderful")
    header = base64.b64encode(b"admin:wonderful").decode()
    assert redacted(f"admin:wonderful wonderful {header}") == "*** *** ***"


def test_a_password_in_a_variable_s_url_is_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLINE_MLFLOW_URI", "postgresql://me:p4ss%21word@db:5432/mlflow")
    assert redacted('auth failed: "p4ss!word", p4ss%21word') == 'auth failed: "***", ***'


@pytest.mark.parametrize("text, expected", [
    ("postgresql://me:secret@db/x failed", "postgresql://me:***@db/x failed"),
    ("at 'https://me:se@cret@db:80/x'", "at 'https://me:***@db:80/x'"),
    ("https://h/x?a=1&token=abc&b=2", "https://h/x?a=1&token=***&b=2"),
    ("s3://b/x?X-Amz-Signature=0a1b", "s3://b/x?X-Amz-Signature=***"),
    ("{'Authorization': 'Bearer abc123def'}", "{'Authorization': 'Bearer ***'}"),
    (f"git clone https://{HF}@huggingface.co/x", "git clone https://***@huggingface.co/x"),
    (f"token={HF}.", "token=***."),
    ("AKIA" + "ABCD1234" * 2, "***"),
    ("ghp_" + "a1" * 18, "***"),
    ("pnu_" + "a1" * 18, "***"),
    ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxw", "***"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "***"),
])  # fmt: skip
def test_urls_headers_and_shapes(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize("text", [
    "slimgpt-20 of HuggingFaceTB/SmolLM2-135M-Instruct at 0123456789abcdef0123456789abcdef01234567",
    "prune-slimgpt-v2-0123456789abcdef", "hf_transfer is off", "layers.3.mlp.down_proj", "me@example.com",
    "http://127.0.0.1:4200/api: 'x' a@b", "basic settings", "ssh://git@host/x", "1 of 12: 3:4", "tokens: 128",
])  # fmt: skip
def test_everything_else_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_password_that_is_a_word_leaves_other_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "smooth")
    assert redacted("smooth smoothing") == "*** smoothing"


def test_the_place_of_a_secret_is_named() -> None:
    assert place_of_secret({"a": {"b": ["x", {"c": HF}]}}) == "a.b.1.c"
    assert place_of_secret({"a": {HF: 1}}) == "a.(a key)"
    assert place_of_secret({"a": 1, "b": None, "c": 0.5, "d": "x"}) is None
    assert has_password("https://u:p@h")
    assert not has_password("https://h/x")


def raised(error: Exception) -> Exception:
    try:
        with secrets_kept():
            raise error
    except Exception as found:
        return found


@pytest.mark.parametrize("error", [
    SourceMissing(f"no {HF}"), ValueError(f"no {HF}", 3), RuntimeError({"token": HF}), KeyError(HF),
    OSError(2, "No such file", f"/x/{HF}"), UnicodeDecodeError("utf-8", HF.encode(), 0, 1, HF),
])  # fmt: skip
def test_no_exception_leaves_with_a_secret(error: Exception) -> None:
    expected = type(error) if isinstance(error, SourceMissing | ValueError | KeyError | OSError) else Exception
    clean = raised(error)
    assert HF not in f"{clean!s}{clean!r}{clean.args}{vars(clean)}"
    assert "***" in str(clean)
    assert isinstance(clean, (expected, RuntimeError))
    assert not isinstance(error, SourceMissing) or type(clean) is SourceMissing


def test_an_exception_that_came_from_a_telling_one_stands_alone() -> None:
    class Answer(Exception):
        def __init__(self, request: str) -> None:
            super().__init__("no")
            self.request = request

    error = SourceMissing("the hub says no")
    error.__cause__ = error.__context__ = Answer(f"Authorization: Bearer {HF}")
    clean = raised(error)
    assert clean is error
    assert (clean.__cause__, clean.__context__) == (None, None)
    assert "request" not in vars(raised(Answer(HF)))


def test_other_exceptions_keep_what_they_came_from() -> None:
    cause = KeyError("x")
    error = ValueError("plain")
    error.__cause__ = cause
    assert raised(error) is error
    assert error.__cause__ is cause


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    factory, stream = logging.getLogRecordFactory(), io.StringIO()
    logger, handler = logging.getLogger("somebody.else"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    keep_secrets_out_of_logs()
    keep_secrets_out_of_logs()
    yield logger, stream
    logging.setLogRecordFactory(factory)
    logger.removeHandler(handler)


def test_no_log_line_of_anybody_has_a_secret(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    logger.warning("asked %s with %s, %d%%", "https://u:p@h/x", HF, 7)
    try:
        raise ValueError(f"cause {HF}")
    except ValueError:
        logger.exception("it failed")
    text = stream.getvalue()
    assert HF not in text
    assert "asked https://u:***@h/x with ***, 7%" in text
    assert "ValueError: cause ***" in text
    assert "Traceback" in text
