"""How long an answer may become that a task has written. Imports nothing: a run is planned with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the length of an answer; of several the first counts, as in lm-eval."""

_MAX_GEN_TOKS = 256
"""lm-eval's default."""


def max_gen_toks(settings: Mapping[str, Any]) -> int:
    """Tokens of an answer by a task's generation settings."""
    given = (settings[key] for key in LENGTH_KEYS if settings.get(key) is not None)
    return int(next(given, _MAX_GEN_TOKS))
