"""Runs of a model that launch none of this library's kernels, and note what they would launch."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from fastconv.graphs import Graphs

# Called with a kernel (of triton.JITFunction), Triton's name of a variant, and what `preload` compiles that from.
Note = Callable[[Any, str, str], None]


@contextlib.contextmanager
def without_launches(model: nn.Module, note: Note) -> Iterator[None]:
    """Context in which the model's kernels are not launched, but each of their variants noted, once."""
    with _without_graphs(model), _noting(note):
        yield


@contextlib.contextmanager
def _noting(note: Note) -> Iterator[None]:
    from triton import knobs

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        if not fn.module.startswith("fastconv.kernels."):
            return bool(before and before(key=key, fn=fn, compile=compile, **rest))
        note(fn.jit_function, key, compile["specialization_data"])
        # What Triton finds the next time: it takes a while to tell of a launch.
        fn.jit_function.device_caches[compile["device"]][0][key] = NotLaunched()
        return True

    kernels = all_kernels()
    known = [kernel.device_caches for kernel in kernels]
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        # Of what this process has compiled already Triton would not tell, and launch it, on what others have not made.
        for kernel in kernels:
            kernel.device_caches = defaultdict(kernel.create_binder)
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
        for kernel, caches in zip(kernels, known, strict=True):
            kernel.device_caches = caches


class NotLaunched:
    """Stands for a compiled kernel, and does nothing."""

    function = packed_metadata = None

    def run(self, *given: Any) -> None:
        """No launch."""

    launch_metadata = run


def all_kernels() -> list[Any]:
    """Every kernel of this library."""
    import triton

    from fastconv import kernels

    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__
    ]


class _Unrecorded(Graphs):
    """Graphs that run every time as they do once before they are recorded."""

    def _record(self, graph: Any, key: tuple, model: nn.Module, forward: Any) -> None:
        graph.replay = partial(graph.run, forward)


@contextlib.contextmanager
def _without_graphs(model: nn.Module) -> Iterator[None]:
    """A model's graphs record nothing: launches that are not made would be missing in them."""
    given = {m: m.fastconv_graphs for m in model.modules() if getattr(m, "fastconv_graphs", None) is not None}
    try:
        for module in given:
            module.fastconv_graphs = _Unrecorded()  # type: ignore[assignment]
        yield
    finally:
        for module, graphs in given.items():
            module.fastconv_graphs = graphs
