"""The one exception of the evaluation room."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Something the user gave cannot be evaluated; the message names the value and the way out."""
