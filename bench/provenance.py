"""Where figures come from: the device, the versions and the state of the code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

import fastconv
import fastconv.bench
import fastconv.kernels
import fastconv.reference

_HERE = Path(__file__).resolve().parent
_PACKAGES = (fastconv, fastconv.kernels, fastconv.reference, fastconv.bench)


def code_state() -> str:
    """A hash of all sources that a figure depends on. It needs no git and is the same for the same files.

    By their names in the package, which are the same in a checkout and in an installation.
    """
    files = {}
    for package in _PACKAGES:
        folder = Path(package.__path__[0])
        within = Path(*package.__name__.split("."))
        files |= {within / path.relative_to(folder): path for path in folder.rglob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", _HERE, *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(device: torch.device) -> dict[str, object]:
    """Device, versions, commit (None without git) and the state of the code."""
    changes = _git("status", "--porcelain")
    return {
        **_device(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "code": code_state(),
        "command": " ".join(sys.argv),
    }


def _device(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {"device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads", "capability": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
