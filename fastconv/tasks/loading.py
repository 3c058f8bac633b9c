"""The model and the tokenizer of a checkpoint for a task; a head that the checkpoint lacks is an error."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastconv
from fastconv import checkpoints, tokenization
from fastconv.folders import find_folder, read_json
from fastconv.models import FAMILIES

if TYPE_CHECKING:
    from fastconv.tasks.task import Task

# Which table of the model an input looks up, by the name of its size in the config.
TABLES = {
    "input_ids": "vocab_size",
    "token_type_ids": "type_vocab_size",
    "input_shape_ids": "shape_vocab_size",
    "input_pronunciation_ids": "pronunciation_vocab_size",
}
# The heads of these tasks have parameters of the same names, often of the same shapes too.
_SAME_NAMES = ({"fill-mask", "text-generation"}, {"text-classification", "token-classification", "multiple-choice"})
# What the head that config.json names was trained for.
_TASKS_OF_HEAD = {
    "ForMaskedLM": ("fill-mask",),
    "ForPreTraining": ("fill-mask", "next-sentence"),
    "LMHeadModel": ("text-generation",),
    "ForCausalLM": ("text-generation",),
    "ForNextSentencePrediction": ("next-sentence",),
    "ForSequenceClassification": ("text-classification",),
    "ForTokenClassification": ("token-classification",),
    "ForQuestionAnswering": ("question-answering",),
    "ForMultipleChoice": ("multiple-choice",),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model in eval mode, its tokenizer, and what they take together.

    limit: the longest row
    table_sizes: name of an input -> ids must be less
    """

    model: Any
    tokenizer: Any
    limit: int
    table_sizes: dict[str, int]


def load(
    task: type[Task], name_or_folder: str | os.PathLike[str], device: torch.device, dtype: torch.dtype
) -> Checkpoint:
    """The model of a checkpoint with the head that the task needs, and its tokenizer.

    Raises FileNotFoundError, NotADirectoryError, ImportError or OSError as `from_pretrained` does; ValueError if the
    checkpoint is unfit for the task.
    """
    folder = find_folder(name_or_folder, (*checkpoints.FILES, *tokenization.FILES))
    config = read_json(folder / "config.json")
    family, head = _choose(task, config, folder)
    task.check_config(config)
    tokenizer = getattr(fastconv, f"{family}Tokenizer").from_pretrained(folder)
    model = _load_model(task, getattr(fastconv, family + head), folder, device, dtype)
    limit = min(model.config.max_position_embeddings, tokenizer.model_max_length)
    sizes = {name: getattr(model.config, size) for name, size in TABLES.items() if hasattr(model.config, size)}
    return Checkpoint(model, tokenizer, limit, sizes)


def _choose(task: type[Task], config: dict[str, Any], folder: Path) -> tuple[str, str]:
    """The family and the head of the class for this task. Raises ValueError if there is none."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        expected = ", ".join(map(repr, FAMILIES))
        raise ValueError(
            f"{str(folder / 'config.json')!r}: model_type must be one of {expected}, got {config.get('model_type')!r}"
        )
    head = task.heads.get(config["model_type"])
    if head is None:
        raise ValueError(
            f"task {task.name} is for model_type {' or '.join(map(repr, task.heads))}, "
            f"but {str(folder)!r} holds a {config['model_type']!r}"
        )
    _check_head(task, family, config.get("architectures"), folder)
    return family, head


def _check_head(task: type[Task], family: str, architectures: Any, folder: Path) -> None:
    """Raise ValueError if config.json names a head of another task whose parameters have the same names."""
    named = [str(name).removeprefix(family) for name in architectures] if isinstance(architectures, list) else []
    fit = [name for head in named for name in _TASKS_OF_HEAD.get(head, ())]
    if task.name not in fit and any(task.name in tasks and tasks & set(fit) for tasks in _SAME_NAMES):
        raise ValueError(
            f"{str(folder)!r} holds a {', '.join(architectures)}, which is for --task {' or '.join(fit)}; "
            f"got {task.name}"
        )


def _load_model(
    task: type[Task], model_class: type[Any], folder: Path, device: torch.device, dtype: torch.dtype
) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = model_class.from_pretrained(folder, dtype=dtype, device=device)
    for warning in caught:
        if not isinstance(warning.message, checkpoints.CheckpointWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        random = [name for name in warning.message.missing if not task.needs_no_head or "pooler." not in name]
        if random:
            raise ValueError(
                f"{str(folder)!r} is unfit for task {task.name}: it lacks the head of {model_class.__name__} "
                f"({checkpoints.listed(random, 3)}), so results would be random; "
                "give a checkpoint that was trained for it"
            )
    return model
