"""The folders of checkpoints and tokenizers: finding one, reading its JSON, replacing its files."""

from __future__ import annotations

import importlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BYTES_IN_A_MESSAGE = 40


def find_folder(name_or_folder: str | os.PathLike[str], files: Sequence[str | tuple[str, ...]]) -> Path:
    """The folder that a checkpoint's name stands for: itself if it exists, else what the hub has under that id.

    name_or_folder: a folder, or a hub id like "org/name"
    files: patterns of the file names to download when it is a hub id; of those in tuples, the first tuple's that the
        hub has

    Raises FileNotFoundError, NotADirectoryError, ImportError (no huggingface_hub), OSError (download).
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"expected a checkpoint folder, got the file {str(folder)!r}; give its folder")
    name = os.fspath(name_or_folder)
    if not isinstance(name_or_folder, str) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name!r} is neither an existing folder nor a hub id like 'org/name'")
    return _download(name, files)


def _download(name: str, files: Sequence[str | tuple[str, ...]]) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"there is no folder {name!r}, and downloading it as a hub id needs huggingface_hub: "
            "pip install huggingface_hub, or download the folder yourself and give its path"
        ) from error
    always = [pattern for pattern in files if isinstance(pattern, str)]
    for choice in [pattern for pattern in files if isinstance(pattern, tuple)] or [()]:
        try:
            folder = Path(hub.snapshot_download(name, allow_patterns=[*always, *choice]))
        except Exception as error:  # the hub's own errors, those of its HTTP client, a full disk: one message for all
            raise OSError(
                f"there is no folder {name!r}, and it could not be downloaded from the hub: {error}"
            ) from error
        if any(next(folder.glob(pattern), None) for pattern in choice):
            break
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or ValueError if the file holds something else."""
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {str(file.parent)!r}: {what_is_there(file.parent)}")
    raw = file.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        start = raw[:_BYTES_IN_A_MESSAGE]
        raise ValueError(f"{str(file)!r} is not JSON: {error}; it starts with {start!r}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object, got a {type(content).__name__}")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object the way that transformers does: sorted, indented by two."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def what_is_there(folder: Path) -> str:
    """What a folder holds, for an error that says what is missing from it."""
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"it holds {shown}" if names else "it is empty"


@contextmanager
def replacing(folder: str | os.PathLike[str], stale: re.Pattern[str] | None = None) -> Iterator[Path]:
    """Yield an empty folder to write files into; they replace those of `folder` only once all are written.

    stale: names of files that are removed from `folder` then, unless they were written
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"expected a folder to save into, got the file {str(target)!r}")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        yield Path(temporary)
        written = sorted(Path(temporary).iterdir())
        for file in written:
            os.replace(file, target / file.name)
        if stale is not None:
            names = {file.name for file in written}
            for file in target.iterdir():
                if stale.fullmatch(file.name) and file.name not in names:
                    file.unlink()
