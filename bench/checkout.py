"""Importing this makes `import fastconv` import this checkout, here and in processes started from another folder.

An installation arranges the folders kernels/, reference/ and bench/ inside the package; where there is none (a machine
without pip or without a network), or only one of another checkout, a temporary folder of symbolic links does.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _importable() -> bool:
    # Each by itself: from the root as the current folder the package is found, and an installation's kernels.
    folders = {"fastconv": ROOT / "fastconv", "fastconv.kernels": ROOT / "kernels", "fastconv.bench": ROOT / "bench"}
    for name, folder in folders.items():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != folder:
            return False
    return True


def _link() -> None:
    folder = Path(tempfile.mkdtemp(prefix="fastconv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "fastconv"
    package.mkdir()
    for source in (*(ROOT / "fastconv").iterdir(), ROOT / "kernels", ROOT / "reference", ROOT / "bench"):
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    sys.modules.pop("fastconv", None)
    importlib.invalidate_caches()


if not _importable():
    _link()
