"""The tensors in a checkpoint folder: one safetensors file, or an index of shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.folders import read_json, what_is_there

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLE_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a checkpoint is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, from model.safetensors, else from the shards of its index.

    Raises FileNotFoundError (no such file, a missing shard), ValueError (a file that is something else, or not whole).
    """
    if (folder / WEIGHTS).is_file():
        return _tensors_of(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"no {WEIGHTS} and no {INDEX} in {str(folder)!r}: {what_is_there(folder)}; other kinds of weights, like "
            "pytorch_model.bin, must be saved as safetensors first (transformers: save_pretrained)"
        )
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{str(folder / INDEX)!r} must hold a weight_map of names to files, got {places!r:.80}")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        names = [name for name, place in places.items() if place == shard]
        if Path(shard).name != shard:
            raise ValueError(f"{str(folder / INDEX)!r} names the shard {shard!r}, expected a file of that folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"the shard {shard} is missing in {str(folder)!r}; {INDEX} says that it holds {listed(names)}"
            )
        stored = _tensors_of(folder / shard)
        if absent := [name for name in names if name not in stored]:
            raise ValueError(f"{str(folder / shard)!r} lacks {listed(absent)}, which {INDEX} says it holds")
        found.update({name: stored[name] for name in names})
    return found


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    with open_safetensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return {
            name: StoredTensor(file, tuple(stored.get_shape()), stored.get_dtype()) for name, stored in slices.items()
        }


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """A safetensors file, open. Raises ValueError for a file that is something else, or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} {_what_it_is(file)}; expected safetensors: {error}") from error
    with opened as tensors:
        yield tensors


def _what_it_is(file: Path) -> str:
    """What a file is that is not safetensors, and what to do."""
    with file.open("rb") as opened:
        start = opened.read(24)
    if start.startswith(b"PK\x03\x04") or start[:2] in _PICKLE_PROTOCOLS:
        return (
            "is a pickle, which can run code when it is loaded and is not read; "
            "save the model as safetensors first (transformers: save_pretrained)"
        )
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer; get the file itself with git lfs pull"
    return f"is truncated or corrupted ({file.stat().st_size} bytes); get it again"


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names for an error: all, or the first of them and how many more."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
