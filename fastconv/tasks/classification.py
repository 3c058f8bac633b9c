"""text-classification, next-sentence and multiple-choice: one or some scores for a text or a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastconv.tasks.loading import Checkpoint
from fastconv.tasks.task import Item, Row, Task, check_count, check_text, labels_of

_ALL = ("bert", "convbert", "roc_bert")


class TextClassification(Task):
    """{label, score} for a text or a pair of texts; with top_k a list of them.

    The scores are probabilities: the softmax over the labels; the sigmoid of each where problem_type is
    multi_label_classification or there is one label; the bare outputs where problem_type is regression.
    """

    name = "text-classification"
    heads = dict.fromkeys(_ALL, "ForSequenceClassification")
    fields = ("text", "text_pair")

    def __init__(self, checkpoint: Checkpoint, *, truncate: bool = False, top_k: int | None = None) -> None:
        super().__init__(checkpoint, truncate=truncate)
        check_count("top_k", top_k)
        self._top_k = top_k
        self.several_lines = (top_k or 1) > 1
        self.lists_single = top_k is None
        config = self.model.config
        self._labels = labels_of(config)
        self._kind = config.problem_type
        if self._kind is None:
            self._kind = "multi_label_classification" if config.num_labels == 1 else "single_label_classification"

    def encode(self, items: Sequence[Item]) -> list[list[Row]]:
        return encode_pairs(self, items)

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        logits = self.model(**inputs).logits.float()
        if self._kind == "single_label_classification":
            logits = logits.softmax(-1)
        elif self._kind == "multi_label_classification":
            logits = logits.sigmoid()
        return logits.tolist()

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        scored = [{"label": self._labels[index], "score": score} for index, score in enumerate(outputs[0])]
        scored.sort(key=lambda entry: entry["score"], reverse=True)
        return scored[0] if self._top_k is None else scored[: self._top_k]


class NextSentence(Task):
    """{label, score}: IsNext if the second text follows the first, else NotNext."""

    name = "next-sentence"
    heads: ClassVar[Mapping[str, str]] = {"bert": "ForNextSentencePrediction"}
    fields = ("text", "text_pair")
    required = 2

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        check_pairs(cls.name, config)

    def encode(self, items: Sequence[Item]) -> list[list[Row]]:
        return encode_pairs(self, items)

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        return self.model(**inputs).logits.float().softmax(-1).tolist()

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        follows, random = outputs[0]
        label, score = ("IsNext", follows) if follows >= random else ("NotNext", random)
        return {"label": label, "score": score}


class MultipleChoice(Task):
    """{index, choice, score}: the best of some choices for a prompt; with top_k a list of them.

    The score is the softmax over the choices. Each goes through the model by itself, as the pair (prompt, choice).
    """

    name = "multiple-choice"
    heads = dict.fromkeys(_ALL, "ForMultipleChoice")
    fields = ("prompt", "choices")
    required = 2

    def __init__(self, checkpoint: Checkpoint, *, truncate: bool = False, top_k: int | None = None) -> None:
        super().__init__(checkpoint, truncate=truncate)
        check_count("top_k", top_k)
        self._top_k = top_k
        self.several_lines = (top_k or 1) > 1

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        check_pairs(cls.name, config)

    def check_field(self, name: str, value: Any) -> Any:
        if name == "prompt":
            return check_text(name, value)
        if not isinstance(value, list | tuple):
            raise TypeError(f"choices must be a list of str, got {type(value).__name__}")
        if len(value) < 2:
            raise ValueError(f"choices must be at least 2, got {len(value)}")
        return [check_text(f"choices[{index}]", choice) for index, choice in enumerate(value)]

    def encode(self, items: Sequence[Item]) -> list[list[Row]]:
        pairs = [(item["prompt"], choice) for item in items for choice in item["choices"]]
        rows = iter(self.tokenize([prompt for prompt, _ in pairs], [choice for _, choice in pairs]))
        return [[next(rows) for _ in item["choices"]] for item in items]

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        # As one choice each: a score doesn't depend on the other choices.
        return self.model(**{name: ids[:, None] for name, ids in inputs.items()}).logits[:, 0].float().tolist()

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        scores = torch.tensor(outputs).softmax(0).tolist()
        scored = [
            {"index": index, "choice": choice, "score": score}
            for index, (choice, score) in enumerate(zip(item["choices"], scores, strict=True))
        ]
        scored.sort(key=lambda entry: entry["score"], reverse=True)
        return scored[0] if self._top_k is None else scored[: self._top_k]


def encode_pairs(task: Task, items: Sequence[Item]) -> list[list[Row]]:
    """The row of each text or pair of texts."""
    rows: list[list[Row]] = [[] for _ in items]
    for paired in (False, True):
        indices = [index for index, item in enumerate(items) if ("text_pair" in item) is paired]
        seconds = [items[index]["text_pair"] for index in indices] if paired else None
        made = task.tokenize([items[index]["text"] for index in indices], seconds)
        for index, row in zip(indices, made, strict=True):
            rows[index] = [row]
    return rows


def check_pairs(name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a model that can't tell the texts of a pair apart."""
    if config.get("type_vocab_size", 2) < 2:
        raise ValueError(f"task {name} takes pairs of texts, which needs type_vocab_size 2 or more, got 1")
