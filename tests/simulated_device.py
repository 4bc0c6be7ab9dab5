"""A device that is not the CPU, on a CPU: values are real, mixed devices are refused, waits of the host are counted.

A tensor on it wraps a CPU tensor, on which its operations compute, so that the bits are those of the CPU's kernels. It
is a backend of its own in torch (PrivateUse1): autograd, autocast and optimizers take it for a GPU. Not seen: kernels
of CUDA, their rounding, streams. `is_cuda` is false: code must ask for `device.type != "cpu"`.

A wait counts where the host must have a value, and where it copies: a copy to the device waits for earlier work there
unless it is `non_blocking`; one from the device always waits, since nothing here pins memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "simulated"
DEVICE = torch.device("privateuseone:0")
"""Its name is `NAME` once `register` was called."""
ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) + "/" for folder in ("tune_sparse", "trainables"))
WAITING = {
    aten._local_scalar_dense.default,
    aten._linalg_check_errors.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operations whose result, or its shape, the host must have."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""They take indices from the CPU, and wait for what a mask selects."""
LOWER_PRECISION = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "scaled_dot_product_attention")
"""Operations of a transformer that autocast computes in the lower precision, as on CUDA."""
FULL_PRECISION = ("log_softmax.int", "nll_loss", "cross_entropy_loss", "pow.Tensor_Scalar", "rsqrt", "softmax.int")


@dataclass
class Activity:
    """What was asked of the device since the activity was made."""

    waits: Counter[str] = field(default_factory=Counter)
    """times that the host waited, by the line of our code"""
    launches: Counter[str] = field(default_factory=Counter)
    """operations that compute, by name"""
    moved_bytes: int = 0
    """that operations read and wrote, each tensor once an operation"""
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0

    @property
    def waited(self) -> int:
        return self.waits.total()


_activity = Activity()


class Simulated(torch.Tensor):
    """A tensor on the device."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> Simulated:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            layout=value.layout,
            device=DEVICE,
        )
        made.value = value
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({self.value})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        torch.Tensor.data.__set__(self, new)
        self.value = new.value

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _compute(op, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees what makes a tensor on the device from none."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_here(kwargs.get("device")) or _simulated((args, kwargs)):
            return _compute(op, args, kwargs)
        return op(*args, **kwargs)


@contextmanager
def simulated_device() -> Iterator[Activity]:
    """Have this process compute on the device, and note what is asked of it."""
    global _activity
    register()
    before = PartialState().device
    PartialState._shared_state["device"] = DEVICE
    _activity = Activity()
    try:
        with _Everywhere():
            yield _activity
    finally:
        PartialState._shared_state["device"] = before


@cache
def register() -> tuple[Library, ...]:
    """Make the device known to torch, in this process and for good; before its first backward pass, which settles the
    devices that the autograd engine knows."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = Library("aten", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("silu_backward", partial(_kernel, aten.silu_backward.default), "PrivateUse1")
    others = Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(fallthrough_kernel)
    for names, dtype in ((LOWER_PRECISION, None), (FULL_PRECISION, torch.float32)):
        for name in names:
            library.impl(name, partial(_autocast, _operation(name), dtype), "AutocastPrivateUse1")
    return library, others  # what they registered goes with them


class _Backend(_DummyBackendModule):
    """What torch asks of the module of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, *_: Any) -> bool:
        return True

    def manual_seed(self, seed: int) -> None:
        """Random numbers are the CPU's."""

    def synchronize(self, *_: Any) -> None:
        """Nothing is under way."""

    def current_stream(self, *_: Any) -> None:
        return None


def _compute(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if op in (aten.copy_.default, aten._to_copy.default):
        return _copy(op, args, kwargs)
    given = _simulated((args, kwargs))
    _check_devices(op, given, args, kwargs)
    if op in WAITING or (op in INDEXING and _has_mask(args[1])):
        _activity.waits[_line()] += 1
    elif not op.is_view:
        _activity.launches[str(op)] += 1
    there = _is_here(kwargs.get("device"))
    out = op(*tree_map(_value, args), **_on_cpu(kwargs))
    if not op.is_view:
        made = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        _activity.moved_bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
    if not given and not there:
        return out
    wrapped = tree_map(_wrapped, out)
    return return_and_correct_aliasing(op, args, kwargs, wrapped) if given else wrapped


def _copy(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Between the host and the device, or in one of them."""
    in_place = op is aten.copy_.default
    to, source = (args[0], args[1]) if in_place else (kwargs.get("device"), args[0])
    is_to_device = isinstance(to if in_place or to is not None else source, Simulated) or _is_here(to)
    waits = not (kwargs.get("non_blocking") or (in_place and args[2:] == (True,)))
    _note_copy(source, is_to_device, waits)
    out = op(*tree_map(_value, args), **_on_cpu(kwargs))
    if in_place:
        return to
    out = out.clone() if out is _value(source) else out
    return Simulated(out) if is_to_device else out


def _note_copy(source: Tensor, is_to_device: bool, waits: bool) -> None:
    size = source.numel() * source.element_size()
    if not size:
        return
    if isinstance(source, Simulated) and is_to_device:
        _activity.launches["copy"] += 1
        return
    if is_to_device:
        _activity.uploaded_bytes += size
    else:
        _activity.downloaded_bytes += size
    if waits or not is_to_device:
        _activity.waits[_line()] += 1


def _check_devices(op: Any, given: list[Simulated], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise as CUDA does, which takes numbers, and indices, from the CPU."""
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    others = [tensor for tensor in tensors if not isinstance(tensor, Simulated) and tensor.dim()]
    if op in INDEXING and isinstance(args[0], Simulated):
        others = [tensor for tensor in others if tensor.dtype not in (torch.long, torch.bool)]
    if given and others:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(f"Expected all tensors to be on the same device, got cpu tensors {shapes} in {op}")


def _line() -> str:
    """Name the innermost line of our code on the stack."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a backward pass"  # autograd computes it in a thread of its own


def _is_here(device: Any) -> bool:
    return isinstance(device, torch.device | str) and torch.device(device).type == DEVICE.type


def _simulated(tree: Any) -> list[Simulated]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Simulated)]


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Simulated) else leaf


def _wrapped(leaf: Any) -> Any:
    return Simulated(leaf) if isinstance(leaf, Tensor) else leaf


def _on_cpu(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {"pin_memory": False} if kwargs.get("pin_memory") else {}
    changed |= {"device": "cpu"} if kwargs.get("device") is not None else {}
    return {name: tree_map(_value, value) for name, value in kwargs.items()} | changed


def _operation(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _autocast(op: Any, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """Compute in `dtype`, by default in the lower precision that is asked for."""
    to = dtype or torch.get_autocast_dtype(DEVICE.type)

    def cast(leaf: Any) -> Any:
        is_number = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.device.type == DEVICE.type
        return leaf.to(to) if is_number else leaf

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*tree_map(cast, args), **tree_map(cast, kwargs))


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The CPU's own kernel of an operation that torch composes of others for a device that it does not know."""
    return _compute(op, args, kwargs)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Simulated(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Simulated(torch.empty(size, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _note_copy(source, isinstance(to, Simulated), waits=not non_blocking)
    _value(to).copy_(_value(source))
    return to
