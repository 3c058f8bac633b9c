"""Conversion of the checkpoints of ConvBERT's original code, in TensorFlow 1, to folders that every library reads."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastconv import reference
from fastconv.checkpoints.loading import match_names, skeleton
from fastconv.checkpoints.original_checkpoint import PARTS, find_prefix, read_config, read_variables
from fastconv.checkpoints.saving import write_checkpoint
from fastconv.checkpoints.stored_tensors import StoredTensor, listed
from fastconv.tokenization.files import read_vocab

_MODELS = {"discriminator": "ConvBertModel", "generator": "ConvBertForMaskedLM"}


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did.

    model_class: name of the class that the folder holds
    parameters: how many numbers were written
    left_out: variables of other parts and heads, which the folder lacks; the optimizer's are not told
    """

    model_class: str
    parameters: int
    left_out: list[str]


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    vocab: str | os.PathLike[str] | None = None,
    part: str = "discriminator",
) -> Conversion:
    """Write config.json, model.safetensors and vocab.txt for a TensorFlow 1 checkpoint of ConvBERT's original code.

    checkpoint: the prefix of its files, "model.ckpt-1000000", one of them, or their folder
    folder: to write into, which transformers reads too
    config: a JSON file with the original's names or transformers'; None: config.json beside the checkpoint
    vocab: a vocab.txt; None: the one beside the checkpoint, if there is one
    part: "discriminator", the encoder that is used downstream, with the head that tells replaced tokens; or
        "generator" with its masked language modelling head, for which the config must be the generator's

    Its outputs are those of the original up to rounding, except where a whole row is padding: see
    `fastconv.reference.ConvBertModel`.

    Raises ImportError without tensorflow; FileNotFoundError; ValueError, TypeError for a checkpoint, a config or a
    vocabulary that is something else, for parameters that are missing or of other shapes than the config's, for an
    even conv_kernel_size, and for a head_ratio other than 2, with which the original's shapes are others.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(map(repr, PARTS))}, got {part!r}")
    prefix = find_prefix(checkpoint)
    config_file = prefix.parent / "config.json" if config is None else Path(config)
    settings = read_config(config_file)
    if (Path(folder) / "config.json").exists() and (Path(folder) / "config.json").samefile(config_file):
        raise ValueError(f"{str(folder)!r} holds the config to read, which would be replaced; give another folder")
    vocab_file = prefix.parent / "vocab.txt" if vocab is None else Path(vocab)
    if vocab is not None or vocab_file.is_file():
        _check_vocab(vocab_file, settings.vocab_size)
    if part == "generator" and settings.hidden_act != "gelu":
        raise ValueError(
            f"the masked language modelling head of ConvBertForMaskedLM has the activation 'gelu', got "
            f"{settings.hidden_act!r} in {str(config_file)!r}"
        )
    tensors, left_out = read_variables(prefix, part)
    model_class = _MODELS[part]
    _check(model_class, settings, tensors, repr(str(prefix)))
    values = {**settings.to_dict(), "architectures": [model_class], "dtype": "float32"}
    weights = {name: tensor.read().float() for name, tensor in tensors.items()}
    write_checkpoint(folder, values, weights)
    if vocab_file.is_file() and vocab_file.resolve() != (Path(folder) / "vocab.txt").resolve():
        shutil.copyfile(vocab_file, Path(folder) / "vocab.txt")
    return Conversion(model_class, sum(tensor.numel() for tensor in weights.values()), left_out)


def _check(model_class: str, config: reference.ConvBertConfig, tensors: dict[str, StoredTensor], source: str) -> None:
    """Raise ValueError unless the tensors are exactly the parameters of a model with this config."""
    model = skeleton(getattr(reference, model_class), config)
    if missing := match_names(model, tensors, source).missing:
        raise ValueError(f"{source} lacks parameters of {model_class}: {listed(missing)}")


def _check_vocab(file: Path, vocab_size: int) -> None:
    tokens = len(read_vocab(file))
    if tokens > vocab_size:
        raise ValueError(f"{str(file)!r} has {tokens} tokens, expected at most the config's vocab_size {vocab_size}")
