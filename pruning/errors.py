"""What pruning raises: PruningError for what a user gave, UnsoundCheckpoint for what we wrote; and in which of its
parts memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

MemoryPart = Literal["loading", "the forward", "solving"]
_NOTE = "memory ran out in "
#: in what libraries say of it; whether that is so is asked where it is tried again
_WORDS = ("memory", "ALLOC_FAILED", "bad_alloc")


class PruningError(ValueError):
    """Something the user gave cannot be used; the message names the value and the way out."""


class UnsoundCheckpoint(RuntimeError):
    """A checkpoint that was just written does not load, or computes something else than it should: our own fault."""


@contextmanager
def memory_for(part: MemoryPart) -> Iterator[None]:
    """Let what is raised for want of memory say for what it was wanted: each part is helped by something else."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if memory_part(error) is None and (
            isinstance(error, MemoryError) or any(word in str(error) for word in _WORDS)
        ):
            error.add_note(_NOTE + part)  # a note goes with the error to another process
        raise


def memory_part(error: BaseException) -> MemoryPart | None:
    """The part in which memory ran out, if that is known."""
    notes = getattr(error, "__notes__", ())
    return next((part for part in get_args(MemoryPart) if _NOTE + part in notes), None)
