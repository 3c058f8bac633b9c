"""What `verify` runs: the class, config, weights and tokenizer that the name of a model stands for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastconv import checkpoints, models, reference, tokenization
from fastconv.folders import find_folder, read_json
from fastconv.models import FAMILIES
from fastconv.parity import shapes
from fastconv.parity.paths import Weights

_OVER_VOCABULARY = ("ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM")


@dataclass(frozen=True)
class Subject:
    """A model to verify.

    name: as it was given
    class_name: of fastconv.models
    weights: fp32, on the CPU
    source: where they are from, in words
    notes: what whoever reads the result should know
    """

    name: str
    class_name: str
    config: reference.Config
    weights: Weights
    tokenizer: Any
    source: str
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the model learns; tied ones count once."""
        return sum({tensor.data_ptr(): tensor.numel() for tensor in self.weights.values()}.values())

    @property
    def max_length(self) -> int:
        """The longest sequence that the model and its tokenizer take."""
        return min(self.config.max_position_embeddings, self.tokenizer.model_max_length)

    def flops_per_token(self) -> int:
        """About what a forward costs for a token: two per weight that is not an embedding."""
        dense = (t.numel() for name, t in self.weights.items() if "embeddings" not in name and t.dim() > 1)
        return max(1, 2 * sum(dense))

    def numbers_per_token(self) -> int:
        """About how many numbers the main output has for a token."""
        return self.config.vocab_size if self.class_name.endswith(_OVER_VOCABULARY) else self.config.hidden_size


def load(name: str | os.PathLike[str], sentences: Sequence[str]) -> Subject:
    """The model of a checkpoint folder, of a hub id, or of one of shapes.NAMES with random weights.

    sentences: what the vocabulary of a model with random weights is made of

    Raises: FileNotFoundError, NotADirectoryError, ValueError, ImportError, OSError: there is no such model, or its
    files can't be read.
    """
    if name in shapes.NAMES and not Path(name).is_dir():
        model = shapes.build(os.fspath(name))
        tokenizer = shapes.train_tokenizer(sentences, model.config.vocab_size)
        return _subject(name, model, tokenizer, "random weights", [])
    try:
        folder = find_folder(name, (*checkpoints.FILES, *tokenization.FILES))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, nor one of {', '.join(shapes.NAMES)}") from None
    class_name, tokenizer_class, notes = classes(folder)
    tokenizer = tokenizer_class.from_pretrained(folder)
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        torch.manual_seed(0)  # for the parameters of a head that the checkpoint lacks
        model = getattr(models, class_name).from_pretrained(folder, dtype=torch.float32)
    notes += [str(warning.message) for warning in caught]
    return _subject(name, model, tokenizer, "checkpoint", notes)


def one_layer(name: str | os.PathLike[str]) -> tuple[str, reference.Config]:
    """The class and the config that `load` finds, with a single layer: all are of the same shapes.

    Of a checkpoint only config.json is needed. Raises: what `load` raises.
    """
    if name in shapes.NAMES and not Path(name).is_dir():
        model = shapes.build(os.fspath(name), num_hidden_layers=1)
        return type(model).__name__, model.config
    folder = find_folder(name, ["config.json"])
    class_name, _, _ = classes(folder)
    config_class = getattr(models, class_name).config_class
    config = config_class.from_pretrained(folder)
    return class_name, config_class.from_dict({**config.to_dict(), "num_hidden_layers": 1})


def _subject(name: str | os.PathLike[str], model: Any, tokenizer: Any, source: str, notes: list[str]) -> Subject:
    weights = model.state_dict()
    return Subject(os.fspath(name), type(model).__name__, model.config, weights, tokenizer, source, tuple(notes))


def classes(folder: Path) -> tuple[str, Any, list[str]]:
    """The class that config.json names, or else the encoder of its family; the class of its tokenizer; and notes."""
    config = read_json(folder / "config.json")
    if config.get("model_type") not in FAMILIES:
        expected = " or ".join(map(repr, FAMILIES))
        raise ValueError(
            f"{str(folder / 'config.json')!r}: model_type must be {expected}, got {config.get('model_type')!r}"
        )
    family = FAMILIES[config["model_type"]]
    tokenizer_class = getattr(tokenization, f"{family}Tokenizer")
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise ValueError(f"{str(folder / 'config.json')!r}: architectures must be a list of names, got {named!r}")
    named = [str(architecture) for architecture in named]
    for architecture in named:
        if architecture.startswith((f"{family}For", f"{family}LMHead")) and hasattr(models, architecture):
            return architecture, tokenizer_class, []
    encoder = f"{family}Model"
    note = f"config.json names {', '.join(named)}, which fastconv lacks: this is its encoder, {encoder}"
    return encoder, tokenizer_class, [note] if named and encoder not in named else []
