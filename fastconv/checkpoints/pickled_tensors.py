"""pytorch_model.bin: a state dict that torch.save wrote, as a zip archive or in the older format.

Such a file is a pickle, which could run code. So it is read by torch's restricted reader alone, which knows tensors and
plain containers and refuses the rest before anything of it is executed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastconv.checkpoints.stored_tensors import StoredTensor, listed, what_it_is

# What torch's reader says of a function or class that it refuses.
_REFUSED = re.compile(r"GLOBAL (\S+)")
# And of the formats that it refuses as a whole: before torch 0.1.10 a tar archive, and TorchScript's.
_REFUSED_FORMAT = "Cannot use ``weights_only=True`` with"


@contextmanager
def open_pickle(file: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a pytorch_model.bin by name, mapped into memory where the file allows it, else read as a whole.

    Raises ValueError for a file that holds anything but a state dict, that is something else, or not whole.
    """
    content = _load(file)
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds a {type(content).__name__}, expected a state dict: names and tensors")
    other = {name: value for name, value in content.items() if not _is_plain(name, value)}
    if other:
        kinds = [f"{name!r} ({_kind(value)})" for name, value in other.items()]
        raise ValueError(
            f"{str(file)!r} holds what is no named tensor: {listed(kinds)}; expected a state dict: names and tensors. "
            "Of a training checkpoint, save the model's state dict alone"
        )
    stored = {
        name: StoredTensor(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            partial(torch.Tensor.detach, tensor),  # a pickle may give a tensor a `detach` of its own
        )
        for name, tensor in content.items()
    }
    del content  # so that a tensor is freed once it is taken out
    yield stored


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except Exception as error:  # a broken pickle raises almost anything
        if refused := _REFUSED.search(str(error)):
            raise ValueError(
                f"{str(file)!r} is refused: it is a pickle that asks for {refused[1]}, where only tensors are "
                "expected; nothing of it was executed. If you trust its source, load it there and save safetensors"
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if not line.startswith("Check the documentation")]
        why = next((line for line in reversed(lines) if line), type(error).__name__)
        what = what_it_is(file)
        if _REFUSED_FORMAT in str(error):
            what = "is refused: a tar or TorchScript archive could run code"
        elif isinstance(error, pickle.UnpicklingError) and "Git LFS" not in what:
            what = "is no pickle of tensors"
        raise ValueError(f"{str(file)!r} {what}; expected a state dict that torch.save wrote: {why:.200}") from error


def _can_be_mapped(file: Path) -> bool:
    """Whether the tensors lie in the file as they are: not in the older format, nor where a zip tool compressed it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _is_plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor, {'nested' if value.is_nested else value.layout}, on {value.device.type}"
    return type(value).__name__
