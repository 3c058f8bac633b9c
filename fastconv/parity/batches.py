"""Sentences to batches of ids: as they are, padded to the longest, or joined and cut to one exact length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# How many sentences are tokenized at a time when they are joined.
_CHUNK = 256


@dataclass(frozen=True)
class Batch:
    """What a model is called with; `lengths` are the numbers of tokens of its sequences without padding."""

    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @property
    def size(self) -> int:
        """Tokens with padding."""
        return self.inputs["input_ids"].numel()


def from_sentences(sentences: Sequence[str], tokenizer: Any, *, batch: int, count: int, max_length: int) -> list[Batch]:
    """`count` batches of `batch` sentences, taken evenly from all, repeated where there are fewer, padded on the right.

    max_length: what longer sentences are cut to
    """
    wanted = batch * count
    last = len(sentences)
    chosen = [sentences[index * last // wanted if last >= wanted else index % last] for index in range(wanted)]
    return [
        _batch(
            tokenizer(
                chosen[start : start + batch],
                padding=True,
                truncation=True,
                max_length=max_length,
                padding_side="right",
                return_tensors="pt",
            )
        )
        for start in range(0, wanted, batch)
    ]


def of_length(sentences: Sequence[str], tokenizer: Any, *, batch: int, count: int, length: int) -> list[Batch]:
    """`count` batches of `batch` sequences of exactly `length` tokens: [CLS], the text going on, [SEP]; no padding.

    Raises: ValueError if the text has no tokens.
    """
    wanted = batch * count * (length - 2)
    around = tokenizer([""])  # RoCBert's tokenizer makes three rows of ids of a text
    streams: dict[str, list[int]] = {name: [] for name in around if name.endswith("_ids") and name != "token_type_ids"}
    for start in range(0, len(sentences), _CHUNK):
        rows = tokenizer(list(sentences[start : start + _CHUNK]), add_special_tokens=False)
        for name, ids in streams.items():
            ids += [number for row in rows[name] for number in row]
        if len(streams["input_ids"]) >= wanted:
            break
    if not streams["input_ids"]:
        raise ValueError("the text has no tokens; give one with words")
    columns = {}
    for name, ids in streams.items():
        ids = (ids * (wanted // len(ids) + 1))[:wanted]
        columns[name] = torch.empty(count, batch, length, dtype=torch.int64)
        columns[name][..., 0], columns[name][..., -1] = around[name][0]
        columns[name][..., 1:-1] = torch.tensor(ids).view(count, batch, length - 2)
    columns["token_type_ids"] = torch.zeros_like(columns["input_ids"])
    columns["attention_mask"] = torch.ones_like(columns["input_ids"])
    return [_batch({name: column[index] for name, column in columns.items()}) for index in range(count)]


def _batch(inputs: dict[str, Tensor]) -> Batch:
    return Batch(dict(inputs), tuple(inputs["attention_mask"].sum(dim=1).tolist()))
