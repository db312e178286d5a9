"""Warnings of a state that lasts, which every stage that meets it would repeat."""

from __future__ import annotations

import logging
from functools import lru_cache


@lru_cache(maxsize=1000)
def warn_once(sentence: str) -> None:
    """Log a warning, once in a process."""
    logging.getLogger("slimline").warning("%s", sentence)
