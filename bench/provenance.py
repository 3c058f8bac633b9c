"""Where figures come from: the device, the versions and the state of the code."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

import fastconv
import fastconv.bench
import fastconv.kernels
import fastconv.reference
from fastconv.parity.environment import cpu_name, version

_HERE = Path(__file__).resolve().parent
_PACKAGES = (fastconv, fastconv.kernels, fastconv.reference, fastconv.bench)
# What only asks for figures or shows them: a change in a table is no reason to measure again.
_SHOWS = (
    *("fastconv/cli.py", "fastconv/commands/", "fastconv/progress.py", "fastconv/bench/compare"),
    *("fastconv/bench/gpu.py", "fastconv/bench/html", "fastconv/bench/plots", "fastconv/bench/progress.py"),
    *("fastconv/bench/passed_tests.py", "fastconv/bench/readme.py", "fastconv/bench/records.py"),
    *("fastconv/bench/results.py", "fastconv/bench/table.py", "fastconv/bench/test_ops.py"),
)


def code_state() -> str:
    """A hash of all sources that a figure depends on, and of the tables of launch configs, the user's too.

    It needs no git and is the same for the same files: by their names in the package, which are the same in a checkout
    and in an installation.
    """
    files: dict[str, Path] = {}
    for package in _PACKAGES:
        folder = Path(package.__path__[0])
        within = Path(*package.__name__.split("."))
        found = (*folder.rglob("*.py"), *folder.glob("tables/*.json"))
        files |= {(within / path.relative_to(folder)).as_posix(): path for path in found}
    if importlib.util.find_spec("triton") is not None:
        from fastconv.kernels._configs import user_table

        own_table = user_table()
        if own_table is not None and own_table.is_file():
            files["the user's table"] = own_table
    return hash_of({name: path for name, path in files.items() if not name.startswith(_SHOWS)})


def hash_of(files: Mapping[str, Path]) -> str:
    """A short hash of files and their names."""
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


def provenance(device: torch.device, command: str) -> dict[str, object]:
    """Device, versions, commit (None without git), the state of the code, and how and when it was run.

    "dirty" is whether sources differ from the commit; a results file that is being written doesn't count.
    """
    changes = _git("status", "--porcelain", "--", ":/*.py")
    return {
        **_device(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "code": code_state(),
        "command": command,
        "date": now(),
    }


def now() -> str:
    """The time in ISO 8601, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _device(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {"device": f"{cpu_name()}, {torch.get_num_threads()} threads", "capability": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
    }
