"""How many bytes a function moves: counted from what Triton's interpreter loads and stores and what torch's ops get.

`counting()` yields a Traffic that sees, while it is open, every load and store of every program, by address, without
those that a mask leaves out; and of every op of torch that isn't a view its tensor arguments as read and its results as
written. What it can't see: how often a byte is read (a cache may serve it again, or not), whole cache lines where a
kernel wants parts of them, and what an op of torch does inside: a gather would count its whole table.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import fastconv.kernels

# Ops whose results hold nothing yet, and those that don't look at what they write to.
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_OVERWRITING = ("copy_", "fill_", "zero_", "set_")


class _Storage:
    """Which bytes of one storage were read and written."""

    def __init__(self, tensor: torch.Tensor, made: bool) -> None:
        self.base, self.size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.made = made
        self.read, self.written = (np.zeros(self.size, dtype=bool) for _ in range(2))
        self.held = tensor.detach()  # so that nothing else gets its address


class Traffic:
    """What was read and written, by storage."""

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}

    def add(self, tensor: torch.Tensor, *, made: bool = False) -> _Storage:
        """Its storage; `made`: it wasn't there before."""
        base = tensor.untyped_storage().data_ptr()
        if base not in self._storages:
            self._storages[base] = _Storage(tensor, made)
        return self._storages[base]

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages

    def mark(self, tensor: torch.Tensor, *, written: bool) -> None:
        """All elements of a tensor."""
        storage = self.add(tensor)
        _elements(storage.written if written else storage.read, tensor)[...] = True

    def mark_addresses(self, addresses: np.ndarray, size: int, *, written: bool) -> None:
        """`size` bytes at each of these addresses."""
        left = addresses
        for base, storage in self._storages.items():
            inside = (left >= base) & (left < base + storage.size)
            if inside.any():
                bits = storage.written if written else storage.read
                for byte in range(size):
                    bits[left[inside] - base + byte] = True
                left = left[~inside]
        assert not len(left), "a kernel went outside of its tensors"

    def read(self, *, without: list[torch.Tensor]) -> int:
        """Bytes read of what was there before; each once."""
        skipped = {t.untyped_storage().data_ptr() for t in without}
        return sum(int(s.read.sum()) for s in self._storages.values() if not s.made and s.base not in skipped)

    def unread(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Names of those of which an element was not read."""
        return [name for name, t in tensors.items() if not self.add(t).read.all()]

    def written(self, kept: list[torch.Tensor]) -> int:
        """Bytes written of what is there after: the elements of `kept`, each once, but not what was there before."""
        wanted: dict[int, np.ndarray] = {}
        for tensor in kept:
            storage = self.add(tensor)
            if storage.made:
                bits = wanted.setdefault(storage.base, np.zeros(storage.size, dtype=bool))
                _elements(bits, tensor)[...] = True
        return sum(int((bits & self._storages[base].written).sum()) for base, bits in wanted.items())


def _elements(bits: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
    """Of a storage's bytes those of a tensor, (..., element size)."""
    size = tensor.element_size()
    strides = (*(stride * size for stride in tensor.stride()), 1)
    return np.lib.stride_tricks.as_strided(bits[tensor.storage_offset() * size :], (*tensor.shape, size), strides)


class _Ops(TorchDispatchMode):
    """Tells a Traffic of the ops of torch."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for tensor in given:
            self._traffic.add(tensor)
        out = func(*args, **kwargs)
        if func.namespace == "fastconv":  # the launchers tell
            return out
        name = func.__name__.partition(".")[0]
        mutated = self._mutated(func, args, kwargs)
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not self._traffic.holds(t)]
        for tensor in fresh:
            self._traffic.add(tensor, made=True)
        if name in _EMPTY or not (mutated or fresh):  # a view, or nothing
            return out
        for tensor in given:
            if not (name in _OVERWRITING and any(tensor is other for other in mutated)):
                self._traffic.mark(tensor, written=False)
        for tensor in [*mutated, *fresh]:
            self._traffic.mark(tensor, written=True)
        return out

    @staticmethod
    def _mutated(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        found = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name, args[place] if place < len(args) else None)
                found += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        return found


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what happens inside; on a CPU with Triton's interpreter."""
    from triton.runtime import interpreter

    traffic, ops = Traffic(), contextlib.ExitStack()
    mode = _Ops(traffic)
    native, run = interpreter._interpreter, interpreter.GridExecutor.__call__

    def load(addresses: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        traffic.mark_addresses(addresses[mask].ravel(), np.dtype(dtype).itemsize, written=False)
        return native.load(addresses, mask, other, dtype)

    def store(addresses: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        traffic.mark_addresses(addresses[mask].ravel(), value.dtype.itemsize, written=True)
        native.store(addresses, value, mask)

    def grid(self: Any, *args: Any, **kwargs: Any) -> None:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                traffic.add(tensor)
        with _disable_current_modes():  # what the interpreter does with torch
            run(self, *args, **kwargs)

    def told(launcher: Any) -> Any:
        # An op's implementation runs without the modes around it.
        @functools.wraps(launcher)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    traffic.add(tensor)
            with _Ops(traffic):
                return launcher(*args, **kwargs)

        return wrapped

    names = [name for name in dir(native) if not name.startswith("__")]
    counted = SimpleNamespace(**{name: getattr(native, name) for name in names})
    counted.load, counted.store = load, store
    with ops:
        ops.enter_context(mock.patch.object(interpreter, "_interpreter", counted))
        ops.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", grid))
        for info in pkgutil.iter_modules(fastconv.kernels.__path__):
            module = importlib.import_module(f"fastconv.kernels.{info.name}")
            for name, function in vars(module).copy().items():
                if inspect.isfunction(function) and function.__module__ == module.__name__ and _launches(name):
                    ops.enter_context(mock.patch.object(module, name, told(function)))
        ops.enter_context(mode)
        yield traffic


def _launches(name: str) -> bool:
    return name.endswith(("_fwd", "_depthwise")) or "_bwd" in name
