"""Whether an error says that memory ran out. By name, so that asking imports nothing."""

from __future__ import annotations

import errno

_TYPES = {"torch.OutOfMemoryError", "builtins.MemoryError"}
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "DefaultCPUAllocator",
    "STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def short_of_memory(error: BaseException) -> bool:
    """True for CUDA's, torch's CPU allocator's, Python's and the operating system's way to say so."""
    if class_names(error) & _TYPES or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def class_names(error: BaseException) -> set[str]:
    """Its classes as "<top package>.<name>"."""
    return {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(error).__mro__}
