"""Tensors of the pretended device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend

from tests.pretended.counts import count_copy, count_operation, count_wait
from tests.pretended.runtime import Runtime

NAME = "pretended"

aten = torch.ops.aten
#: operations whose outcome a host must know before it can go on: numbers, shapes, whether a factorisation succeeded
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_linalg_check_errors", "unique_dim", "_unique2"}
#: operations that take indices from the host
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
#: operations that copy, whatever their tensors' devices
_COPIES = {"copy_", "_to_copy"}


class PretendedTensor(Tensor):
    """Claims to lie on the device; `inner` is where it does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **more: Any) -> str:
        return f"PretendedTensor({self.inner!r})"

    def tolist(self) -> Any:
        """PyTorch gives no subclass away as a list."""
        count_copy(self.numel() * self.itemsize, to_device=False, waits=True)
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def pretended_device() -> torch.device:
    """The device; PyTorch knows it from the first call on."""
    _install()
    return torch.device(NAME, 0)


@contextmanager
def pretended(free_bytes: int = 2**34) -> Iterator[torch.device]:
    """The device while it says that it is available, with so much free memory."""
    device, runtime = pretended_device(), _install()
    runtime.available, runtime.free_bytes = True, free_bytes
    try:
        yield device
    finally:
        runtime.available = False


@cache
def _install() -> Runtime:
    runtime = Runtime()

    class Hook(_DummyPrivateUse1Hook):  # type: ignore[misc]
        def is_available(self) -> bool:
            return runtime.available

        def has_primary_context(self, dev_id: int) -> bool:
            return runtime.available

    _setup_privateuseone_for_python_backend(NAME, backend_module=runtime, hook=Hook())
    for name in ("empty.memory_format", "empty_strided"):
        _library().impl(name, _factory(getattr(aten, name.partition(".")[0])), "PrivateUse1")
    # torch.tensor(..., device=...) copies where no subclass is asked
    _library().impl("_copy_from", lambda source, target, non_blocking=False: _copy_(target, source), "PrivateUse1")
    return runtime


@cache
def _library() -> torch.library.Library:
    return torch.library.Library("aten", "IMPL")


def _factory(packet: Any) -> Callable[..., Tensor]:
    def make(*args: Any, device: Any = None, pin_memory: Any = None, **more: Any) -> Tensor:
        return PretendedTensor(packet(*args, device="cpu", **more))

    return make


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.partition("::")[2]
    if name == "copy_":
        return _copy_(*args, **kwargs)
    if name == "_to_copy":
        return _to_copy(args[0], **kwargs)
    if name == "is_pinned":
        return False
    # in inference mode what others see decomposed comes here whole
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)
    _refuse_mixture(name, args, kwargs)
    goes = "device" in kwargs and torch.device(kwargs["device"] or NAME).type == "cpu"
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    if name in _WAITS or (name in _INDEXING and _has_mask(args)):
        count_wait(name)
    if name == "_local_scalar_dense":
        count_copy(args[0].inner.itemsize, to_device=False, waits=False)
    count_operation()
    if func is aten.mm.dtype:  # the CPU has no such product
        left, right, dtype = args
        return PretendedTensor(left.inner.to(dtype) @ right.inner.to(dtype))
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if goes:
        return found
    return _aliased(func, args, kwargs, tree_map(_wrapped, found))


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    inside, outside = isinstance(target, PretendedTensor), isinstance(source, PretendedTensor)
    if inside != outside:
        size = target.numel() * min(target.itemsize, source.itemsize)
        count_copy(size, to_device=inside, waits=not non_blocking)
    _inner(target).copy_(_inner(source))
    return target


def _to_copy(source: Tensor, **kwargs: Any) -> Tensor:
    device = kwargs.pop("device", None)
    non_blocking = kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    copied = aten._to_copy.default(_inner(source), **kwargs)
    if device is None or torch.device(device).type == NAME:
        return PretendedTensor(copied)
    assert torch.device(device).type == "cpu", device
    count_copy(source.numel() * source.itemsize, to_device=False, waits=not non_blocking)
    return copied


def _refuse_mixture(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """As CUDA does: numbers of the host may take part, and indices, which are copied."""
    for value in tree_leaves((args, kwargs)):
        if not isinstance(value, Tensor) or isinstance(value, PretendedTensor) or not value.dim():
            continue
        if name not in _INDEXING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME}:0 and {value.device} (of {name})"
            )
        count_copy(value.numel() * value.itemsize, to_device=True, waits=True)


def _has_mask(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.dtype == torch.bool for value in tree_leaves(args[1]))


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendedTensor) else value


def _wrapped(value: Any) -> Any:
    return PretendedTensor(value) if isinstance(value, Tensor) else value


def _aliased(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> Any:
    """What an operation changed in place is given back as the very object."""
    returns, arguments = func._schema.returns, func._schema.arguments
    written = {
        frozenset(argument.alias_info.after_set): kwargs.get(argument.name) if index >= len(args) else args[index]
        for index, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    if not written:
        return found
    values = list(found) if len(returns) > 1 else [found]
    for index, each in enumerate(returns):
        if each.alias_info is not None and each.alias_info.is_write:
            values[index] = written[frozenset(each.alias_info.after_set)]
    return tuple(values) if len(returns) > 1 else values[0]
