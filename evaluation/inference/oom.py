"""Memory that ran out: which errors say so, and what can be given back. Nothing is imported for it, not even torch."""

from __future__ import annotations

import ctypes
import errno
import gc
import sys

_TYPES = {"torch.OutOfMemoryError", "builtins.MemoryError"}
_WORDS = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "STATUS_ALLOC_FAILED", "std::bad_alloc")


def short_of_memory(error: BaseException) -> bool:
    """True for CUDA's, torch's CPU allocator's, Python's and the operating system's way to say so."""
    if class_names(error) & _TYPES or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def class_names(error: BaseException) -> set[str]:
    """Its classes as "<top package>.<name>"."""
    return {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(error).__mro__}


def free_memory() -> None:
    """Give back what is no longer used: cycles with tensors in them, CUDA's cached blocks, and the small pieces that
    glibc keeps (a gigabyte of the cache of a model with many layers)."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
