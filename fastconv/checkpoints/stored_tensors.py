"""A tensor in a checkpoint file, whatever the format; and the safetensors format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

_PICKLE_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class StoredTensor:
    """What a tensor of a checkpoint is, and how to get it.

    dtype: as torch names it, "float32"
    read: reads it; it works while its file is open
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


@contextmanager
def open_safetensors(file: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a safetensors file by name. Raises ValueError for a file that is something else, or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} {what_it_is(file)}; expected safetensors: {error}") from error
    with handle as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        yield {
            name: StoredTensor(
                tuple(stored.get_shape()),
                _DTYPES.get(stored.get_dtype(), stored.get_dtype()),
                partial(opened.get_tensor, name),
            )
            for name, stored in slices.items()
        }


def what_it_is(file: Path) -> str:
    """What a file is that can't be read as the format that its name says, and what to do."""
    with file.open("rb") as opened:
        start = opened.read(24)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer; get the file itself with git lfs pull"
    if file.suffix != ".bin" and (start.startswith(b"PK\x03\x04") or start[:2] in _PICKLE_PROTOCOLS):
        return (
            "is a pickle, which is read, without running code in it, under the name pytorch_model.bin only; "
            "rename it, or save the model as safetensors (transformers: save_pretrained)"
        )
    return f"is truncated or corrupted ({file.stat().st_size} bytes); get it again"


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names for an error: all, or the first of them and how many more."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
