"""Batches whose padding stands on either side: masks, and ids and labels for every family and head."""

from __future__ import annotations

import torch
from swap_models import VOCABULARY

S = 7
# The tokens of each row; all together are more than a model has positions.
MASKS = {
    "right": ([0, 7], [0, 3], [0, 1], [0, 6]),
    "left": ([0, 7], [4, 7], [6, 7], [1, 7]),
    "ragged": ([2, 5], [0, 7], [3, 4], [1, 7]),
    "empty row": ([0, 4], [0, 0], [0, 7], [1, 7]),
}

Tensors = dict[str, torch.Tensor]


def mask_of(kind: str) -> torch.Tensor:
    """(4, S), bool."""
    place = torch.arange(S)
    return torch.stack([(place >= first) & (place < last) for first, last in MASKS[kind]])


def draw(*shape: int, high: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def ids_of(family: str, *shape: int, seed: int = 0) -> Tensors:
    """Every kind of ids that a family has but those of positions."""
    streams = ("input_ids", "token_type_ids")
    streams += ("input_shape_ids", "input_pronunciation_ids") if family == "RoCBert" else ()
    return {
        name: draw(*shape, high=2 if name == "token_type_ids" else VOCABULARY, seed=seed + number)
        for number, name in enumerate(streams)
    }


def labels_of(name: str, head: str, keep: torch.Tensor) -> tuple[Tensors, bool]:
    """Labels for a head, ignored at padding, and whether the logits are the tokens'. keep: (B, S), B even."""
    B, length = keep.shape
    tokens = draw(B, length, high=2, seed=5).masked_fill(~keep, -100)
    if name == "BertForPreTraining":
        return {"labels": tokens, "next_sentence_label": draw(B, high=2)}, True
    if name == "RoCBertForPreTraining":
        ids = ids_of("RoCBert", B, length)
        texts = {f"{text}_{key}": value for text in ("labels", "attack") for key, value in ids.items()}
        return texts | {"labels_input_ids": tokens} | {
            f"{text}_attention_mask": keep.long() for text in ("labels", "attack")
        }, True
    if head in ("ForMaskedLM", "LMHeadModel", "ForCausalLM", "ForTokenClassification"):
        return {"labels": tokens}, True
    if head == "ForQuestionAnswering":
        starts, ends = torch.tensor([0, 1, 0, 2]), torch.tensor([6, 2, 0, 3])
        return {"start_positions": starts[:B], "end_positions": ends[:B]}, True
    return {"labels": draw(B // 2 if head == "ForMultipleChoice" else B, high=2, seed=5)}, False
