"""Saving a checkpoint: config.json, and safetensors in one file or in shards with their index."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from fastconv.checkpoints.weight_files import INDEX, WEIGHTS
from fastconv.folders import replacing, write_json

MAX_SHARD_SIZE = "5GB"
_UNITS = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
# What a save writes: a file of an older save that the new one has none for would be loaded as part of it.
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_folder(model: Any, folder: str | os.PathLike[str], max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write config.json and the parameters of a model, of tied ones the first.

    Raises ValueError for a parameter without data, and for embeddings that the config ties but the model doesn't; and
    see `write_checkpoint`.
    """
    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not tied:
        raise ValueError(
            "tie_word_embeddings is True, but the output embeddings are not the word embeddings; call tie_weights(), "
            "or resize_token_embeddings of the whole model, first"
        )
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, expected data to save; load or initialise it first")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    config = model.config.to_dict()
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    write_checkpoint(folder, config, tensors, max_shard_size)


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write config.json and model.safetensors, or shards of at most `max_shard_size` and their index.

    config: what config.json holds, less torch_dtype, the older name of dtype
    max_shard_size: in bytes, or such as "200MB"; a tensor that is larger gets a shard of its own

    What is in the folder is replaced only once all is written, and the safetensors of an older save are removed.
    Raises ValueError, TypeError for a size that is none; NotADirectoryError, OSError.
    """
    from safetensors.torch import save_file

    shards = _split({name: tensor.nbytes for name, tensor in tensors.items()}, parse_size(max_shard_size))
    places: dict[str, str] = {}
    with replacing(folder, stale=_OURS) as temporary:
        write_json(temporary / "config.json", {name: value for name, value in config.items() if name != "torch_dtype"})
        for number, names in enumerate(shards, start=1):
            place = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            places.update(dict.fromkeys(names, place))
            save_file(_apart(tensors, names), str(temporary / place), metadata={"format": "pt"})
            shutil.copymode(temporary / "config.json", temporary / place)  # safetensors 0.8 lets only its owner read it
        if len(shards) > 1:
            totals = {
                "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
                "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            }
            write_json(temporary / INDEX, {"metadata": totals, "weight_map": places})


def _apart(tensors: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """These tensors as safetensors takes them: on the CPU, contiguous, no two in one memory."""
    part: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in names:
        tensor = tensors[name].cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        part[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return part


def _split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, in groups whose sizes sum up to at most `most`; a larger one is alone."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def parse_size(size: int | str) -> int:
    """Bytes: of 200_000_000, "200MB" or "1.5 GiB".

    Raises TypeError, ValueError for what is no size, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"max_shard_size must be an int or a str like '200MB', got {size!r}")
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", size.upper())
        if found is None:
            raise ValueError(f"max_shard_size must be a number and a unit, like '200MB' or '5GiB', got {size!r}")
        size = int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ValueError(f"max_shard_size must be positive, got {size}")
    return size
