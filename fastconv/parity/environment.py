"""What figures are made with: devices, dtypes, versions, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch
from torch.nn import functional as F

import fastconv
from fastconv import dispatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKAGES = ("triton", "transformers", "tokenizers", "safetensors", "matplotlib")


def version(package: str) -> str | None:
    """The installed version of a package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The versions of this library, Python, and what this library uses."""
    return {
        "fastconv": fastconv.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its wheel's name doesn't always tell the build
        **{package: version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda or torch.version.hip,
    }


def device_name(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return cpu_name()
    return str(device)


def cpu_name() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, object]:
    """Versions, system and devices."""
    return {
        **versions(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": driver(),
        **{f"gpu {device.index}": _gpu(device.index) for device in devices() if device.type == "cuda"},
    }


def devices() -> list[torch.device]:
    """The CPU and every GPU that torch finds."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def driver() -> str | None:
    """The version of NVIDIA's driver as it says it itself, if there is one."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return None
    return " ".join(first.partition(":")[2].split())


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory, capability = properties.total_memory / 2**30, f"{properties.major}.{properties.minor}"
    return f"{properties.name}, capability {capability}, {memory:.0f} GiB"


def implementation(device: torch.device) -> str:
    """How ops run on a device, in words."""
    if not dispatch.use_triton(torch.empty(0, device=device)):
        return "native PyTorch ops"
    return "Triton's interpreter, for tests, very slow" if device.type == "cpu" else "Triton kernels"


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device, if it can be used. Raises ValueError."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} can't be used with torch {torch.__version__}: {why}") from error
    return place


def usable_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype, if the device can compute in it. Raises ValueError."""
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None or kind not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        x = torch.ones(1, 2, 2, dtype=kind, device=device)
        F.conv1d(F.layer_norm(x.softmax(-1) @ x, (2,)), x)
    except RuntimeError as error:
        raise ValueError(f"dtype {dtype} can't be computed on {device}: {error}; use fp32 or bf16") from error
    return kind
