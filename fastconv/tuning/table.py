"""The user's table of launch configs, as the search reads and writes it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from fastconv.kernels import _configs
from fastconv.kernels._configs import Asked, Key


class TuningError(RuntimeError):
    """What stops a search: the table can't be read or written, or the GPU doesn't answer any more."""


def identity(asked: Asked) -> tuple[str, Key]:
    """The minor version of triton, and the key of an entry for it."""
    kernel = _configs.KERNELS[asked.kernel]
    return _configs.minor(triton.__version__), _configs.key_of(kernel, asked.shape, asked.dtype, asked.card)


def read(path: Path) -> dict[tuple[str, Key], Any]:
    """The entries of a table that goes on, as they stand there."""
    try:
        entries = _configs.read_entries(path)
        return {_configs.entry_key(entry): entry for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TuningError(f"can't read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise TuningError(
            f"{str(path)!r} is no table of launch configs: {error}; move it away, or correct it"
        ) from error


def check_writable(path: Path) -> None:
    """Raise TuningError where a table can't be written, before anything is searched. Makes its folder."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise TuningError(f"can't write {str(path)!r}: {error.strerror}") from error


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write(path: Path, entries: Sequence[Any]) -> None:
    """Write a table. Whoever is killed meanwhile leaves the old file or the new one, never a part."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"schema": _configs.SCHEMA, "entries": entries}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise TuningError(f"can't write {str(path)!r}: {error.strerror}") from error
