"""Which implementation an op runs: its Triton kernel or its native formulation in PyTorch ops.

`auto` takes Triton for tensors on a GPU that Triton supports, and for any tensor when TRITON_INTERPRET=1 (then the
kernels run in Triton's interpreter); otherwise `native`, which is fast on a CPU and traceable by torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Iterator

import torch

BACKENDS = ("auto", "triton", "native")

# The oldest NVIDIA capability that the kernels are compiled and tested for (Ampere).
_MIN_CAPABILITY = (8, 0)

_current = "auto"
# The backend that a module was given, while its forward runs: per thread, since models are called from several.
_of_module = threading.local()


def check_backend(name: str) -> str:
    """name if it is a backend's name; raises ValueError otherwise."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, BACKENDS))}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context in which every op runs the named implementation: "auto", "triton" or "native".

    "triton" raises where an op has a kernel that can't run on its tensors' device; ops without a kernel, and sizes past
    a kernel's, run natively.
    The choice holds for the whole process, as torch.backends' do, not for one thread.

    Raises: ValueError for another name.
    """
    global _current
    before, _current = _current, check_backend(name)
    try:
        yield
    finally:
        _current = before


@contextlib.contextmanager
def module_backend(name: str) -> Iterator[None]:
    """Context in which every op of this thread runs the named implementation, whatever `backend` says."""
    before = getattr(_of_module, "name", None)
    _of_module.name = name
    try:
        yield
    finally:
        _of_module.name = before


def current() -> str:
    """The backend that ops run with now, here: "auto", "triton" or "native"."""
    return getattr(_of_module, "name", None) or _current


# The package triton exists for Linux only.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Read once, as Triton reads it: a kernel is bound to the interpreter or to the compiler when it is defined.
_INTERPRETING = _TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "yes",
    "y",
)


def unsupported(device: torch.device) -> str | None:
    """Why Triton's compiler can't make kernels for `device`; None where it can."""
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if device.type != "cuda":
        return f"tensors on {device.type!r} need TRITON_INTERPRET=1"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability}, need {_MIN_CAPABILITY}"
    return None


_unsupported_once = functools.cache(unsupported)


def use_triton(x: torch.Tensor) -> bool:
    """Whether an op on x runs its Triton kernel. Raises: RuntimeError if "triton" was asked for and can't run."""
    chosen = current()
    if chosen == "native":
        return False
    if _INTERPRETING and x.device.type == "cpu":
        return True
    if chosen == "auto" and x.device.type != "cuda":
        return False
    # Dynamo traces through a cache, with a warning: in a trace, which runs once, the function itself will do.
    ask = unsupported if torch.compiler.is_compiling() else _unsupported_once
    reason = ask(x.device)
    if reason is not None and chosen == "triton":
        raise RuntimeError(f"backend 'triton' can't run: {reason}; use backend 'auto' or 'native'")
    return reason is None
