"""token-classification and feature-extraction: something for every token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from fastconv.tasks.loading import Checkpoint
from fastconv.tasks.task import Item, Row, Task, labels_of
from fastconv.tokenization.batch_encoding import one_of

_STRATEGIES = ("none", "simple")


class TokenClassification(Task):
    """[{entity, score, index, word, start, end}, ...] for the tokens whose label is not O.

    aggregation_strategy: "none", or "simple", which joins neighbouring tokens of one label (but for its B- or I-) to
        [{entity_group, score, word, start, end}, ...], with the mean of their scores
    """

    name = "token-classification"
    heads = dict.fromkeys(("bert", "convbert", "roc_bert"), "ForTokenClassification")
    needs_offsets = True
    several_lines = True

    def __init__(self, checkpoint: Checkpoint, *, truncate: bool = False, aggregation_strategy: str = "none") -> None:
        super().__init__(checkpoint, truncate=truncate)
        self._simple = one_of("aggregation_strategy", aggregation_strategy, _STRATEGIES) == "simple"
        self._labels = labels_of(self.model.config)

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        scores, labels = self.model(**inputs).logits.float().softmax(-1).max(-1)
        return list(zip(scores.tolist(), labels.tolist(), strict=True))

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        tokens = list(self._tokens(item["text"], rows[0], *outputs[0]))
        if not self._simple:
            return [token for token in tokens if _told(token["entity"], token["score"])]
        groups = [self._join(group) for group in _groups(tokens)]
        return [group for group in groups if _told(group["entity_group"], group["score"])]

    def _tokens(self, text: str, row: Row, scores: list[float], labels: list[int]) -> Iterator[dict[str, Any]]:
        assert row.offsets is not None
        ids = row.inputs["input_ids"]
        words = self.tokenizer.convert_ids_to_tokens(ids)
        for index, (start, end) in enumerate(row.offsets):
            if not row.special[index]:
                unknown = ids[index] == self.tokenizer.unk_token_id
                yield {
                    "entity": self._labels[labels[index]],
                    "score": scores[index],
                    "index": index,
                    "word": text[start:end] if unknown else words[index],
                    "start": start,
                    "end": end,
                }

    def _join(self, group: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "entity_group": group[0]["entity"].split("-", 1)[-1],
            "score": sum(token["score"] for token in group) / len(group),
            "word": self.tokenizer.convert_tokens_to_string([token["word"] for token in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }


class FeatureExtraction(Task):
    """The last hidden state: a list of one list of a list of numbers for each token, [CLS] and [SEP] included."""

    name = "feature-extraction"
    heads = dict.fromkeys(("bert", "convbert", "roc_bert"), "Model")
    needs_no_head = True
    several_lines = True

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        hidden = self.model(**inputs).last_hidden_state.float().cpu()
        return [states[: len(row)] for states, row in zip(hidden, rows, strict=True)]

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        return [outputs[0].tolist()]


def _told(label: str, score: float) -> bool:
    """Whether something was found; a score that is NaN (fp16 that overflows) must be seen, whatever its label."""
    return label != "O" or math.isnan(score)


def _groups(tokens: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Runs of tokens of one label; B- begins a new one."""
    if not tokens:
        return
    group = [tokens[0]]
    for before, token in pairwise(tokens):
        if token["entity"].startswith("B-") or _kind(token["entity"]) != _kind(before["entity"]):
            yield group
            group = []
        group.append(token)
    yield group


def _kind(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
