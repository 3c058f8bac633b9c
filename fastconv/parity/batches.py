"""Sentences to batches of ids: as they are, padded to the longest, or joined and cut to one exact length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastconv.tokenization import BertTokenizer

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


def from_sentences(
    sentences: Sequence[str], tokenizer: BertTokenizer, *, batch: int, count: int, max_length: int
) -> list[Batch]:
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


def of_length(
    sentences: Sequence[str], tokenizer: BertTokenizer, *, batch: int, count: int, length: int
) -> list[Batch]:
    """`count` batches of `batch` sequences of exactly `length` tokens: [CLS], the text going on, [SEP]; no padding.

    Raises: ValueError if the text has no tokens.
    """
    wanted = batch * count * (length - 2)
    ids: list[int] = []
    for start in range(0, len(sentences), _CHUNK):
        rows = tokenizer(list(sentences[start : start + _CHUNK]), add_special_tokens=False)["input_ids"]
        ids += [token for row in rows for token in row]
        if len(ids) >= wanted:
            break
    if not ids:
        raise ValueError("the text has no tokens; give one with words")
    ids = (ids * (wanted // len(ids) + 1))[:wanted]
    inside = torch.tensor(ids).view(count, batch, length - 2)
    batches = []
    for rows in inside:
        input_ids = torch.full((batch, length), tokenizer.sep_token_id)
        input_ids[:, 0] = tokenizer.cls_token_id
        input_ids[:, 1:-1] = rows
        inputs = {
            "input_ids": input_ids,
            "token_type_ids": torch.zeros_like(input_ids),
            "attention_mask": torch.ones_like(input_ids),
        }
        batches.append(_batch(inputs))
    return batches


def _batch(inputs: dict[str, Tensor]) -> Batch:
    return Batch(dict(inputs), tuple(inputs["attention_mask"].sum(dim=1).tolist()))
