"""Tokens and passwords: recognised and struck out before anything is logged, recorded or refused.

Three ways to know one: it is the value of an environment variable whose name says so (HF_TOKEN), it stands where a URL
keeps its password, or it has the shape that a well-known service gives its tokens. Rather once too often than once too
rarely: what is struck out here is words in messages, never an answer.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote, urlsplit

STRUCK_OUT = "***"

_SHORTEST = 6
_NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|[A-Z]*PASSWORD|PASSWD|PASSPHRASE|PWD|AUTH|AUTH_STRING|CREDENTIALS?|API_?KEY)(_|$)"
)
_KEYS = re.compile(r"(^|_)(ACCESS|PRIVATE|SECRET|SIGNING|ENCRYPTION)_KEY(_|$)")
#: names that say where a secret lies or whether there is one, not what it is; and the shell's own $PWD and $OLDPWD
_NO_VALUE = re.compile(r"(^|_)(FILE|PATH|DIR|SOCK|URL|URI|TYPE|MODE|TTL|TIMEOUT|DISABLE|ENABLED?)(_|$)|^(OLD)?PWD$")
_PLAIN_WORDS = {"true", "false", "none", "null", "default", "enabled", "disabled", "required", "optional"}

_USERINFO = re.compile(r"(?<=://)([^\s/:@'\"]*):([^\s/'\"]+)@")
_QUERY = re.compile(
    r"(?i)([?&](?:[a-z_-]*token|api_?key|key|secret|password|passwd|auth|sig|signature|x-amz-[a-z-]+)=)[^&\s'\"]+"
)
_HEADER = re.compile(r"(?i)\b(bearer|basic)(\s+)(?=\S*\d)[\w.~+/-]{8,}=*")
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}"  # AWS, Google
    r"|pn[ub]_[A-Za-z0-9]{16,}|sk-(?:proj-|ant-)?[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{10,}"  # Prefect, OpenAI, Slack
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----)?"
)


def redacted(text: str) -> str:
    """The text with *** in place of every token and password."""
    for value in _values(frozenset(os.environ.items())):
        if value in text:
            text = re.sub(_alone(value), STRUCK_OUT, text)
    text = _USERINFO.sub(rf"\1:{STRUCK_OUT}@", text)
    text = _QUERY.sub(rf"\1{STRUCK_OUT}", text)
    text = _HEADER.sub(rf"\1\2{STRUCK_OUT}", text)
    return _SHAPES.sub(STRUCK_OUT, text)


def _alone(value: str) -> str:
    """A pattern for the value where it is no part of another word: password "smooth" leaves "smoothing" alone."""
    before, after = (r"(?<!\w)" if value[0].isalnum() else ""), (r"(?!\w)" if value[-1].isalnum() else "")
    return f"{before}{re.escape(value)}{after}"


def place_of_secret(value: Any, place: str = "") -> str | None:
    """Where in nested plain data a token or password stands ("model.id"), None if nowhere. Keys are looked at too."""
    if isinstance(value, str):
        return place if redacted(value) != value else None
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if redacted(str(key)) != str(key):
                return f"{place}.(a key)".lstrip(".")
            found = place_of_secret(inner, f"{place}.{key}".lstrip("."))
            if found is not None:
                return found
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            found = place_of_secret(inner, f"{place}.{index}".lstrip("."))
            if found is not None:
                return found
    return None


def has_password(url: str) -> bool:
    """Whether a URL carries a password or token of its own."""
    return bool(_password_of(url)) or _SHAPES.search(url) is not None or _QUERY.search(url) is not None


@contextmanager
def secrets_kept() -> Iterator[None]:
    """An exception that leaves the block holds no secret, in its message and in those that it was raised from.

    Its type stays, where its message can be changed; else a RuntimeError that names the type takes its place. Here, at
    the source, because whoever catches it (Prefect's states and result files, MLflow, DuckDB) writes it down.
    """
    try:
        yield
    except Exception as error:
        if not _holds_secret(error):
            raise
        raise _cleaned(error) from None


def keep_secrets_out_of_logs() -> None:
    """From now on every log record of this process, whoever's it is, is made without secrets. Idempotent."""
    make = logging.getLogRecordFactory()
    if getattr(make, "keeps_secrets", False):
        return

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        return _redact_(make(*arguments, **named))

    made.keeps_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)


def _redact_(record: logging.LogRecord) -> logging.LogRecord:
    try:
        text = record.getMessage()
    except (TypeError, ValueError, KeyError):
        return record  # a library's mistake in its own format string: logging itself will say so
    if redacted(text) != text:
        record.msg, record.args = redacted(text), None
    if record.exc_info and record.exc_info[1] is not None:
        trace = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
        if redacted(trace) != trace:
            record.exc_text = redacted(trace)  # a formatter takes this text instead of formatting the exception
    return record


@lru_cache(maxsize=1)
def _values(environment: frozenset[tuple[str, str]]) -> tuple[str, ...]:
    """Every form in which a secret of the environment may appear, the longest first."""
    found = {form for name, value in environment for own in secret_values(name, value) for form in _forms(own)}
    return tuple(sorted(found, key=len, reverse=True))


def secret_values(name: str, value: str) -> set[str]:
    """The secrets in an environment variable: its value if its name says so, and the password of a URL."""
    name = name.upper()
    own = {value.strip()} if _NAMES.search(name) or _KEYS.search(name) else set()
    if _NO_VALUE.search(name):
        own = set()
    if "://" in value:
        own |= _password_of(value)
    return {found for found in own if len(found) >= _SHORTEST and found.lower() not in _PLAIN_WORDS}


def _password_of(url: str) -> set[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return set()
    return {password} if password else set()


def _forms(value: str) -> Iterator[str]:
    yield from (value, quote(value, safe=""), unquote(value), base64.b64encode(value.encode()).decode())
    user, colon, password = value.partition(":")  # user:password, as in PREFECT_API_AUTH_STRING
    if colon and user and len(password) >= _SHORTEST and "/" not in user:
        yield password


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and all others that its traceback would show."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting += [found.__cause__, None if found.__suppress_context__ else found.__context__]


def _holds_secret(error: BaseException) -> bool:
    texts = (text for one in _chain(error) for text in (str(one), repr(one.args), repr(vars(one))))
    return any(redacted(text) != text for text in texts)


def _cleaned(error: Exception) -> Exception:
    """The same exception if its message can be changed, else one of its type, else a RuntimeError; without a chain."""
    message = redacted(str(error))
    error.__cause__ = error.__context__ = None
    error.args = tuple(redacted(part) if isinstance(part, str) else part for part in error.args)
    for name, value in list(vars(error).items()):  # requests and httpx keep the request, with its headers
        if redacted(repr(value)) != repr(value):
            del error.__dict__[name]
    with suppress(Exception):  # it may not be able to say what happened any more
        if str(error) and not _holds_secret(error):
            return error
    with suppress(Exception):  # its constructor may want more than a message
        anew = type(error)(message)
        if str(anew) and not _holds_secret(anew):
            return anew.with_traceback(error.__traceback__)
    return RuntimeError(f"{type(error).__name__}: {message}").with_traceback(error.__traceback__)
