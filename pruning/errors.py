"""What pruning raises: PruningError for what a user gave, UnsoundCheckpoint for what we wrote."""

from __future__ import annotations


class PruningError(ValueError):
    """Something the user gave cannot be used; the message names the value and the way out."""


class UnsoundCheckpoint(RuntimeError):
    """A checkpoint that was just written does not load, or computes something else than it should: our own fault."""
