"""Checkpoints: the parameters of a model from a folder with config.json and weights of any format.

`load_folder` takes names with or without the prefix of the family, and copies each tensor straight from its file into
its parameter. Every name that the model or the checkpoint lacks is told.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastconv.checkpoints.stored_tensors import StoredTensor, listed
from fastconv.checkpoints.weight_files import open_tensors

# What stands beside the encoder in the published checkpoints. A model may lack it, and a checkpoint too.
_HEADS = {
    "classifier",
    "cls",
    "discriminator_predictions",
    "generator_lm_head",
    "generator_predictions",
    "pooler",
    "qa_outputs",
    "sequence_summary",
}
# Buffers of older versions, which hold 0, 1, 2, ... and zeros.
_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")
# An encoder's checkpoint has none of them; a decoder that starts from it draws them.
_CROSS_ATTENTION = ".crossattention."
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RANDOM = {"normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_"}


@dataclass(frozen=True)
class Match:
    """Which tensor of a checkpoint goes into which parameter, and what is left over on both sides.

    stored_name: name of a parameter (tied ones: the first name) -> name in the checkpoint
    missing: parameters of the head, or of cross-attention, that the checkpoint lacks
    unused: tensors of heads that the model lacks
    """

    stored_name: dict[str, str]
    missing: list[str]
    unused: list[str]


def match_names(model: Any, stored: dict[str, StoredTensor], source: str) -> Match:
    """Match the names of a checkpoint to the parameters and buffers of a model.

    source: the folder, for errors

    Raises ValueError for a name that belongs to nothing known, for two names of one parameter, for a parameter of the
    encoder that the checkpoint lacks, and for shapes or dtypes that don't fit.
    """
    prefix = f"{model.base_model_prefix}."
    targets = model.state_dict(keep_vars=True)
    found, unused = _find_targets(set(targets), prefix, stored, source)
    if "cls.predictions.decoder.bias" in found and not model.config.tie_word_embeddings:
        # Transformers 5 then does not tie the two: it computes with this one, and stores the other all the same.
        found.pop("cls.predictions.bias", None)
    by_target = {target: found[target] for target in targets if target in found}
    first_name: dict[int, str] = {}
    for name, tensor in targets.items():
        first_name.setdefault(id(tensor), name)

    stored_name: dict[str, str] = {}
    for target, name in by_target.items():
        stored_name.setdefault(first_name[id(targets[target])], name)
    absent = [name for name in first_name.values() if name not in stored_name and not _BUFFERS.search(name)]
    in_encoder = [name for name in absent if not _is_head(name, prefix) and _CROSS_ATTENTION not in name]
    if in_encoder:
        raise ValueError(
            f"{source} lacks parameters of the encoder of {type(model).__name__}: {listed(in_encoder)}; "
            f"it holds {listed(stored, 3)}"
        )
    _check_kinds({name: (targets[name], stored[there]) for name, there in by_target.items()}, source)
    for target, name in by_target.items():
        used = stored_name[first_name[id(targets[target])]]
        if used != name and not bool((stored[used].read() == stored[name].read()).all()):
            raise ValueError(
                f"{source} holds different values as {used} and as {name}, but the config makes them one; "
                "expected tie_word_embeddings false in config.json"
            )
    return Match(stored_name, absent, unused)


def _find_targets(
    targets: set[str], prefix: str, stored: dict[str, StoredTensor], source: str
) -> tuple[dict[str, str], list[str]]:
    """For each name of a model that is stored, the name in the checkpoint; and the names of heads that it lacks."""
    by_target: dict[str, str] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for name in stored:
        modern = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        candidates = (modern, prefix + modern, modern.removeprefix(prefix))
        target = next((candidate for candidate in candidates if candidate in targets), None)
        if target is None:
            if not _BUFFERS.search(name):
                (unused if _is_head(modern, prefix) else unknown).append(name)
        elif target in by_target:
            raise ValueError(f"{source} holds {target} twice, as {by_target[target]} and as {name}; expected one")
        else:
            by_target[target] = name
    if unknown:
        raise ValueError(
            f"{source} holds what no model with its config has: {listed(unknown)}; "
            "does config.json belong to these weights?"
        )
    return by_target, unused


def _is_head(name: str, prefix: str) -> bool:
    return name.removeprefix(prefix).split(".")[0] in _HEADS


def _check_kinds(pairs: dict[str, tuple[torch.Tensor, StoredTensor]], source: str) -> None:
    wrong = [
        f"{name} (checkpoint {list(there.shape)}, config {list(here.shape)})"
        for name, (here, there) in pairs.items()
        if there.shape != tuple(here.shape)
    ]
    if wrong:
        raise ValueError(f"{source} has shapes that are not those of its config: {listed(wrong)}")
    wrong = [f"{name} ({there.dtype})" for name, (_, there) in pairs.items() if there.dtype not in _DTYPES]
    if wrong:
        raise ValueError(f"{source} must hold {', '.join(_DTYPES)} tensors, got {listed(wrong)}")


class NoRandomInit(TorchFunctionMode):
    """Leaves parameters as they were allocated: drawing 10^8 normal numbers takes longer than loading them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(model_class: type[Any], config: Any) -> Any:
    """A model that has names and shapes, but no memory."""
    with torch.device("meta"), NoRandomInit():
        return model_class(config)


def load_folder(
    model_class: type[Any],
    folder: Path,
    config: Any,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A model of `model_class`, built from `config`, with the parameters in `folder`, in eval mode.

    dtype: of the parameters; None: the config's dtype, else float32; "auto": that of the stored tensors

    Warns of parameters of the head, or of cross-attention, that the checkpoint lacks, which stay random, and of heads
    in it that the model lacks. Raises what `open_tensors` and `match_names` do.
    """
    with open_tensors(folder) as stored:
        # First without memory, so that sizes that belong to other weights are told before they are allocated.
        match = match_names(skeleton(model_class, config), stored, repr(str(folder)))
        chosen = choose_dtype(dtype, config, stored.values())
        with torch.device("cpu" if device is None else device), NoRandomInit():
            model = model_class(config)
        if match.missing:
            model.init_weights()
        model.to(dtype=chosen)
        targets = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for target, name in match.stored_name.items():
                # What is popped is freed: where a file can't be mapped, its tensors are in memory until then.
                targets[target].copy_(stored.pop(name).read())
    _warn(model, folder, match)
    return model.eval()


class CheckpointWarning(UserWarning):
    """A checkpoint and a model that don't fit in all parts.

    missing: the parameters that the checkpoint lacks, which are random
    unused: the tensors of heads that the model lacks
    """

    def __init__(self, text: str, match: Match) -> None:
        super().__init__(text)
        self.missing = match.missing
        self.unused = match.unused


def _warn(model: nn.Module, folder: Path, match: Match) -> None:
    told = []
    if match.missing:
        told.append(f"not in the checkpoint, so random until trained: {', '.join(match.missing)}")
    if match.unused:
        told.append(f"in the checkpoint, but not in this model: {', '.join(match.unused)}")
    if told:
        text = f"{type(model).__name__} from {str(folder)!r}: {'; '.join(told)}"
        warnings.warn(CheckpointWarning(text, match), stacklevel=4)


def choose_dtype(dtype: torch.dtype | str | None, config: Any, stored: Iterable[StoredTensor] = ()) -> torch.dtype:
    """The dtype of a model's parameters, see `load_folder`. Raises ValueError if it is no floating-point dtype."""
    asked: Any = dtype
    if asked is None:
        asked = config.extra.get("dtype") or config.extra.get("torch_dtype") or torch.float32
    elif asked == "auto":
        present = {tensor.dtype for tensor in stored}
        asked = next((kind for name, kind in _DTYPES.items() if name in present), torch.float32)
    found = _DTYPES.get(str(asked).removeprefix("torch."))
    if found is None:
        given = f"dtype={dtype!r}" if dtype is not None else f"{asked!r} in config.json"
        raise ValueError(f"the dtype must be one of {', '.join(_DTYPES)}, got {given}")
    return found
