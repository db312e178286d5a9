"""The one exception of the pruning room."""

from __future__ import annotations


class PruningError(ValueError):
    """Something the user gave cannot be used; the message names the value and the way out."""
