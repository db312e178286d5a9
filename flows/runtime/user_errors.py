"""What to tell a user of an exception whose cause they can mend: our own errors, the file system's, and memory.

Asked wherever an exception is met for the last time: the command line, a run for its stages, a night for its cells.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from flows.errors import USER_ERRORS
from tasks.execution.transient import passing

_WAYS_OUT = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the permission, or name another place"),
    errno.EROFS: "mount it for writing, or name another place",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there, or name another place"),
    errno.ENOENT: "see whether somebody removed it",
    errno.ENOTDIR: "a part of this path is a file where a folder is needed; remove it, or name another place",
    errno.EISDIR: "it is a folder where a file is needed; name another place",
    errno.EEXIST: "remove what is in the way, or name another place",
    errno.ENAMETOOLONG: "give a shorter name or path",
    errno.ELOOP: "its symbolic links lead in a circle; remove one of them",
    errno.EMFILE: "allow this process more open files (ulimit -n)",
    errno.ENFILE: "this machine has too many files open; close some programs",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "the disk or network file system fails; see the system's log"),
    errno.EINVAL: "no such thing can be done there; name another place",
    errno.ETXTBSY: "a program is using it; end that first",
}


def user_message(error: BaseException) -> str | None:
    """The sentence for an error whose cause the user can mend, None for any other: a bug, a network that failed."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if passing(error) == "memory":
        return (
            f"memory ran out ({first_line(error)}); ask for smaller batches (SLIMLINE_EVAL_BATCH_SIZE, "
            "SLIMLINE_WALK_BATCH_SIZE, a recovery's micro_batch_size), or take a machine that has more"
        )
    return next((words for cause in causes(error) if (words := _of_file_system(cause))), None)


def exit_code(error: BaseException) -> int:
    """What a command ends with because of it: as it says itself, 2 if the user can mend it, else 1."""
    own = getattr(error, "exit_code", None)
    return own if isinstance(own, int) else 1 if user_message(error) is None else 2


def _of_file_system(error: BaseException) -> str | None:
    if not isinstance(error, OSError) or error.errno not in _WAYS_OUT:
        return None
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    if not paths and error.errno in (errno.ENOENT, errno.EINVAL) and "directory" not in str(error):
        return None  # of a call of the system, not of a path
    reason = error.strerror or os.strerror(error.errno)
    return f"{' and '.join(paths) or 'a file'}: {reason}; {_WAYS_OUT[error.errno]}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from, and so on."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def first_line(error: BaseException) -> str:
    """Of its message, or else its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)
